"""Masks of twelve weights and their report."""

import torch

from altermoma_pl import Masks, SparsityReport

MASKS = Masks(
    {
        "camera.weight": torch.tensor([[True, False], [False, False]]),  # 1 of 4
        "head.weight": torch.tensor([True, True]),  # 2 of 2
        "lidar.weight": torch.tensor([True, True, True, False]),  # 3 of 4
        "camera.late.weight": torch.tensor([False, True]),  # 1 of 2
    }
)
GROUP_OF = {
    "camera.weight": "camera",
    "camera.late.weight": "camera",
    "lidar.weight": "lidar",
    "head.weight": "shared",
}
LOSSES = {"all": 0.5, "without_camera": 1.25}
REPORT = SparsityReport.of(MASKS, GROUP_OF, LOSSES)
