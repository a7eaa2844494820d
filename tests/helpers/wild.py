"""LightningModules with the traits of real fusion projects, small enough to count their weights by hand."""
# ruff: noqa: RUF012 (class attributes that nobody changes)

import threading
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.models import Aliased, Dead, Geometry, Interleaved, TwoTower, scatter


class Wild(LightningModule):
    """A net on batches (image, points, target); 28 weights, as `TwoTower` has."""

    modalities = {"camera": "net.camera", "lidar": "net.lidar"}
    sizes = (3, 2, 1)
    num_weights = 28

    def __init__(self) -> None:
        super().__init__()
        self.net = self.build()

    def build(self) -> Any:
        return scatter(TwoTower(dropout=0.1))

    def loss(self, batch: Any) -> torch.Tensor:
        *inputs, target = batch
        return (self.net(*inputs) - target).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.02, weight_decay=0.1)


def batches(sizes: tuple[int, ...], seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*(torch.randn(16, size, generator=generator) for size in sizes)), 4)


# What a net looks like.


class AliasedTower(Wild):
    """One tower under two names."""

    modalities = {"camera": "net.camera", "lidar": "net.lidar"}
    sizes, num_weights = (3, 3, 1), 24

    def build(self) -> Any:
        return Aliased()


class TiedStem(Wild):
    """Two towers share their stem; it is given to one of them."""

    modalities = {"camera": "net.backbone", "lidar": ["net.lidar", "!net.lidar.0"]}
    sizes, num_weights = (3, 3, 1), 18

    def build(self) -> Any:
        return Aliased(shared_stem=True)


class TiedStemOfBoth(TiedStem):
    """Two towers share their stem, and nobody says whose it is."""

    modalities = {"camera": "net.backbone", "lidar": "net.lidar"}


class DeadHead(Wild):
    """A token and a head that no loss reaches."""

    num_weights = 36

    def build(self) -> Any:
        return Dead()


class GeometryConstants(Wild):
    """An integer parameter and a frozen one that are geometry."""

    num_weights = 14

    def build(self) -> Any:
        return Geometry()


class InterleavedFusion(Wild):
    """Fusion inside the LiDAR stream; a ModuleDict that is iterated and never called."""

    modalities = {
        "camera": "net.towers.camera",
        "lidar": ["net.towers.lidar", "!net.towers.lidar.fusion_*"],
    }
    num_weights = 24

    def build(self) -> Any:
        return Interleaved()


class OneTensor(Wild):
    """Both sensors in the channels of one tensor, encoders in a ModuleDict that is iterated."""

    modalities = {"camera": "net.rgb", "lidar": "net.xyz"}
    sizes, num_weights = (6, 1), 36

    def build(self) -> Any:
        return nn.ModuleDict({"rgb": nn.Linear(3, 4), "xyz": nn.Linear(3, 4), "head": nn.Linear(4, 3)})

    def loss(self, batch: Any) -> torch.Tensor:
        x, target = batch
        parts = {"rgb": x[:, :3], "xyz": x[:, 3:]}
        fused = sum(layer(parts[name]) for name, layer in self.net.items() if name in parts)
        return (self.net["head"](fused.tanh()) - target).square().mean()


class FrozenPart(Wild):
    """The first layer of the camera branch is pre-trained and frozen."""

    num_weights = 32  # 16 + 8 + 8

    def build(self) -> Any:
        net = TwoTower(dropout=0.0)
        net.camera = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.GELU(), nn.Linear(4, 4))
        return scatter(net)


class FrozenTower(Wild):
    """The camera branch is frozen as a whole."""

    def build(self) -> Any:
        net = super().build()
        net.camera.requires_grad_(False)
        return net


class ThreeSensors(Wild):
    """Camera, LiDAR and radar."""

    modalities = {name: f"net.{name}" for name in ("camera", "lidar", "radar")}
    sizes, num_weights = (2, 2, 2, 1), 36  # 3 * 8 + 12

    def build(self) -> Any:
        branches = {name: nn.Linear(2, 4) for name in self.modalities}
        return scatter(nn.ModuleDict({**branches, "head": nn.Linear(12, 1)}))

    def loss(self, batch: Any) -> torch.Tensor:
        *inputs, target = batch
        seen = [self.net[name](x).tanh() for name, x in zip(self.modalities, inputs, strict=True)]
        return (self.net["head"](torch.cat(seen, -1)) - target).square().mean()


class NestedUnderModel(Wild):
    """The net is the model of an agent with a private name."""

    modalities = {"camera": "_agent.model.net.camera", "lidar": "_agent.model.net.lidar"}

    def __init__(self) -> None:
        LightningModule.__init__(self)
        net = self.build()
        self._agent = nn.ModuleDict({"model": nn.ModuleDict({"net": net})})

    @property
    def net(self) -> Any:
        return self._agent["model"]["net"]


class LidarWithoutBackbone(Wild):
    """Points are concatenated as they are: there is no branch to name."""

    def build(self) -> Any:
        return nn.ModuleDict({"camera": nn.Linear(3, 4), "head": nn.Linear(6, 1)})


# How and when it is built.


class BuiltInConfigureModel(Wild):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


class LazyWithDummyBatch(Wild):
    """Lazy layers, initialised by a dummy batch."""

    def build(self) -> Any:
        net = TwoTower(dropout=0.0)
        net.camera[0], net.lidar[0], net.head[1] = nn.LazyLinear(4), nn.LazyLinear(4), nn.LazyLinear(1)
        net(torch.ones(2, 3), torch.ones(2, 2))
        return scatter(net)


class LazyInSetup(Wild):
    """The dummy batch comes in `setup`."""

    def build(self) -> Any:
        net = TwoTower(dropout=0.0)
        net.head[1] = nn.LazyLinear(1)
        return net

    def setup(self, stage: str) -> None:
        self.net(torch.ones(2, 3), torch.ones(2, 2))


class LazyForEver(Wild):
    """Nothing initialises the head before the first batch."""

    def build(self) -> Any:
        net = TwoTower(dropout=0.0)
        net.head[1] = nn.LazyLinear(1)
        return net


class InjectedAndUnserialisable(Wild):
    """The net is injected and among the hyper-parameters, beside a lock that nobody can copy."""

    def __init__(self, net: nn.Module | None = None) -> None:
        LightningModule.__init__(self)
        self.save_hyperparameters()
        self.net = self.build() if net is None else net
        self.lock = threading.Lock()


# How it trains.


class CameraInTrainingOnly(Wild):
    """The camera teaches LiDAR features; nothing else sees it."""

    num_weights = 24  # 12 + 8 + 4

    def build(self) -> Any:
        net = TwoTower(dropout=0.0)
        net.head = nn.Linear(4, 1)
        return scatter(net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        image, points, target = batch
        seen = self.net.lidar(points)
        loss = (self.net.head(seen) - target).square().mean()
        return loss + (seen - self.net.camera(image)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net.head(self.net.lidar(batch[1])).mean())


class EvalInsideTrainingStep(Wild):
    """A branch is in evaluation mode whatever the mode of the module, and `validation_step` trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.camera.eval()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.train()
        super().validation_step(batch, batch_idx)


class WithoutBatchIndex(Wild):
    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)


class LossInADictionary(Wild):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "log": {"train": loss.item()}}


class SumOfADictionary(Wild):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = {"loss_box": self.loss(batch), "loss_size": self.net.camera[0].weight.square().mean()}
        self.log_dict(losses)
        return sum(losses.values())


class SometimesNone(Wild):
    """Batches without objects give no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else self.loss(batch)


class SometimesNoneWithPruningLoss(SometimesNone):
    def pruning_loss(self, batch: Any) -> Any:
        return self.loss(batch)


# What the optimizer gets.


class GroupsByName(Wild):
    """A group for each parameter, with its own learning rate and decay."""

    def configure_optimizers(self) -> Any:
        groups = [
            {
                "params": [p],
                "lr": 0.002 if "camera" in name else 0.02,
                "weight_decay": 0.1 * ("bias" not in name),
            }
            for name, p in self.named_parameters()
        ]
        return torch.optim.AdamW(groups)


class OptimizerOverASubmodule(Wild):
    """Only the camera branch is trained; the others' weights are pruned all the same."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.camera.parameters(), 0.05, momentum=0.9)
