"""Two convolutional towers of 16 channels, one of them with a transposed convolution, and their data."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

torch.set_num_threads(1)


class Frame(NamedTuple):
    image: torch.Tensor  # (3, 8, 8); batches have B in front
    sweep: torch.Tensor  # (2, 8, 8)
    target: torch.Tensor  # (1, 8, 8)


class TwoTowers(LightningModule):
    """Logs much in validation, of which `val_loss` is meant for the progress bar.

    Args:
        width: Channels of each tower.
        example: Whether to have an `example_input_array`.
    """

    def __init__(self, width: int = 16, example: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.camera = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 2, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.lidar = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(2 * width, 1, 1)
        if example:
            self.example_input_array = (
                Frame(*(torch.stack(parts) for parts in zip(*frames(3), strict=True))),
            )

    def forward(self, batch: Frame) -> torch.Tensor:
        return self.head(torch.cat([self.camera(batch.image), self.lidar(batch.sweep)], 1))

    def loss(self, batch: Frame) -> torch.Tensor:
        return (self(batch) - batch.target).square().mean()

    def training_step(self, batch: Frame, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Frame, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True)
        self.log_dict({f"val_detail_{number}": loss for number in range(30)})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Quiet(TwoTowers):
    """Takes tensors rather than batches, of which it has an example, and has no favourite metric."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = stacked(frames(3))[:2]

    def forward(self, image: torch.Tensor, sweep: torch.Tensor) -> torch.Tensor:
        return super().forward(Frame(image, sweep, image))

    def loss(self, batch: Frame) -> torch.Tensor:
        return (self(batch.image, batch.sweep) - batch.target).square().mean()

    def validation_step(self, batch: Frame, batch_idx: int) -> None:
        self.log_dict({f"val_{number}": self.loss(batch) for number in range(30)})


class Detached(TwoTowers):
    """The first layer of the camera is frozen, and no gradient tells where its channels go."""

    def forward(self, batch: Frame) -> torch.Tensor:
        image = self.camera[3:](self.camera[:3](batch.image).detach())
        return self.head(torch.cat([image, self.lidar(batch.sweep)], 1))


class Frames(LightningDataModule):
    def __init__(self, num_val: int = 8) -> None:
        super().__init__()
        self.num_val = num_val

    def train_dataloader(self) -> Any:
        return DataLoader(frames(16), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(frames(self.num_val, seed=1), batch_size=4)


def frames(count: int, seed: int = 0) -> list[Frame]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    sweeps = torch.rand(count, 2, 8, 8, generator=generator)
    targets = images.mean(1, keepdim=True) - sweeps[:, :1]
    return [Frame(*parts) for parts in zip(images, sweeps, targets, strict=True)]


def stacked(parts: list[Frame]) -> Frame:
    """A batch."""
    return Frame(*map(torch.stack, zip(*parts, strict=True)))
