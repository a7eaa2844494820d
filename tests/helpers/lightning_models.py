"""A toy fusion model for Lightning, its data, and short ways to train it.

Prunable weights: camera 3 * 8 + 8 * 4 = 56, lidar 56, head 8; 120 in all.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from altermoma_pl import AlterEva, AlterMOMACallback, OneShot
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.callback.state import PruningState

# Threads cost more than they give on tensors of this size: twenty times where cores are shared.
torch.set_num_threads(1)

MODALITIES = {"camera": ["camera"], "lidar": ["lidar"]}
NUM_WEIGHTS = 120
PRUNABLE = ("camera.0.weight", "camera.3.weight", "lidar.0.weight", "lidar.3.weight", "head.weight")


class Fusion(LightningModule):
    """Two branches of which one has BatchNorm and the other Dropout, and a head."""

    def __init__(self, optimizer: str = "adamw", lr: float = 0.02) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.camera = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.lidar = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))
        self.head = nn.Linear(8, 1)
        self.optimizer, self.lr = optimizer, lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.camera(x[:, :3]), self.lidar(x[:, 3:])], dim=1))

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)


class Manual(Fusion):
    """Manual optimization with an optimizer for each branch; the head goes with the camera."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        first = [*self.camera.parameters(), *self.head.parameters()]
        return [
            torch.optim.SGD(first, 0.02, momentum=0.9, weight_decay=0.01),
            torch.optim.AdamW(self.lidar.parameters(), 0.02),
        ]


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(seed=1)

    def test_dataloader(self) -> Any:
        return loader(seed=2)


class Augmented(Dataset[Any]):
    """Adds noise from every global generator."""

    def __init__(self) -> None:
        self.data = dataset()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 0.1 * (np.random.rand() + random.random() + torch.rand(()).item()), y


def dataset(num: int = 32, seed: int = 0) -> TensorDataset:
    x = torch.randn(num, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :1] * x[:, 3:4] + x[:, 1:2] - x[:, 5:6])


def loader(num: int = 32, batch_size: int = 8, seed: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(num, seed), batch_size, **options)


def pruner(**options: Any) -> AlterMOMACallback:
    """The callback with one event at epoch 1, a short scoring and its components, unless said otherwise."""
    defaults: dict[str, Any] = {
        "modalities": MODALITIES,
        "sparsity": 0.5,
        "schedule": OneShot(1),
        "criterion": short(),
        "figures": False,
        "store_components": True,
    }
    return AlterMOMACallback(**{**defaults, **options})


def short(**options: Any) -> AlterEva:
    return AlterEva(**{"num_probe_batches": 2, "num_reactivation_steps": 2, "learning_rate": 0.01, **options})


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, "callbacks": list(callbacks), **options})


def fit(
    module: LightningModule, *callbacks: Callback, train: Any = None, val: Any = None, **options: Any
) -> Trainer:
    """Train from a fixed seed; the loaders are not shuffled unless given."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    built = trainer(*callbacks, **options)
    built.fit(module, loader() if train is None else train, loader(seed=1) if val is None else val)
    return built


def assert_same(first: Any, second: Any, path: str = "") -> None:
    """Equal bit for bit, through dictionaries and sequences."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    else:
        assert first == second, path


def num_zeros(module: nn.Module, names: Any = PRUNABLE) -> int:
    parameters = dict(module.named_parameters())
    return sum(int((parameters[name] == 0).sum()) for name in names)


def nonzero_pruned(module: nn.Module, masks: Any) -> int:
    """Number of pruned weights that are not zero."""
    parameters = dict(module.named_parameters())
    return sum(int(parameters[name][~mask].count_nonzero()) for name, mask in masks.items())


def pruning_state_of(path: Any) -> PruningState:
    """The first pruning state in a checkpoint, in most runs the only one."""
    return next(iter(pruning_states_of(load_checkpoint(str(path)), str(path)).values()))
