"""A convolutional fusion model for Lightning whose channels can be removed."""

import torch
from torch import nn

from tests.helpers.lightning_models import Fusion


class Towers(Fusion):
    """Two branches of convolutions over three numbers each, and a head."""

    def __init__(self, width: int = 8, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        torch.manual_seed(7)
        self.camera = tower(width)
        self.lidar = tower(width)
        self.head = nn.Linear(8, 1)
        self.example_input_array = torch.randn(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        camera, lidar = self.camera(x[:, None, :3]).mean(2), self.lidar(x[:, None, 3:]).mean(2)
        return self.head(torch.cat([camera, lidar], dim=1))  # (B, 1)


def tower(width: int) -> nn.Sequential:
    """(B, 1, 3) to (B, 4, 3).

    Without a bias before the norm: its gradient is rounding noise, of which Adam makes whole steps.
    """
    first = nn.Conv1d(1, width, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 4, 1))
