"""The models and batches that costs are measured on."""

import math
import tempfile
from collections.abc import Mapping, Sequence

import torch
from lightning import LightningModule
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from examples.data.batch import Batch
from examples.data.datamodule import DrivingData
from examples.models.module import FusionModule
from examples.train import MODALITIES


class Towers(LightningModule):
    """Two linear towers and a linear head: reads its weights and does hardly anything else.

    Args:
        num_parameters: How many weights it should have, about.
        learning_rate: Of AdamW.
    """

    modalities: Mapping[str, Sequence[str]] = {"camera": ["camera"], "lidar": ["lidar"]}

    def __init__(self, num_parameters: float, learning_rate: float = 1e-5) -> None:
        super().__init__()
        self.width = max(4, round(math.sqrt(num_parameters / 4)))
        self.learning_rate = learning_rate
        self.camera = nn.Linear(self.width, self.width)
        self.lidar = nn.Linear(self.width, self.width)
        self.head = nn.Linear(2 * self.width, self.width)

    @property
    def num_parameters(self) -> int:
        """How many it has."""
        return sum(parameter.numel() for parameter in self.parameters())

    def batches(self, count: int, size: int) -> list[Tensor]:
        """Random batches (size, width), on the device of the weights."""
        draws = torch.Generator().manual_seed(1)
        return [
            torch.randn(size, self.width, generator=draws).to(self.camera.weight.device) for _ in range(count)
        ]

    def loss(self, batch: Tensor) -> Tensor:
        """Mean squared distance from the input."""
        seen = torch.cat([self.camera(batch).relu(), self.lidar(batch).relu()], dim=1)
        return (self.head(seen) - batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Fusion(FusionModule):
    """The example's model, whose loss is one number."""

    modalities = MODALITIES

    def loss(self, batch: Batch) -> Tensor:
        """The sum that it is trained on."""
        return super().loss(batch)["loss"]


def fusion(
    size: str, count: int, image_size: tuple[int, int] = (96, 320), device: str = "cpu"
) -> tuple[Fusion, list[Batch]]:
    """The example's model and batches of 4 synthetic frames for it."""
    with tempfile.TemporaryDirectory() as folder:
        data = DrivingData(
            num_train=4 * count, num_val=1, num_calibration=1, image_size=image_size, cache_dir=folder
        )
        data.prepare_data()
        data.setup()
        batches = [move_data_to_device(batch, device) for batch in data.train_dataloader()]
    torch.manual_seed(0)
    module = Fusion(size=size, num_map_classes=len(data.map_classes), image_size=image_size, grid=data.grid)
    return module.to(device), batches
