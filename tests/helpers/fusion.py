"""The example's fusion model at its smallest, and random batches for it."""

import torch

from examples.data.batch import Batch
from examples.grid import BEVGrid
from examples.models.module import FusionModule

GRID = BEVGrid(x_min=0.0, x_max=12.8, y_min=-6.4, y_max=6.4)  # 16 x 16 cells


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (2, 3, 32, 64), generator=generator, dtype=torch.uint8)
    points = torch.rand(100, 4, generator=generator) * torch.tensor([12.8, 6.4, 2.0, 1.0])
    frames = torch.tensor([0, 1])
    return Batch(
        image=image,
        lidar_to_image=torch.tensor(
            [[32.0, -32.0, 0.0, 0.0], [16.0, 0.0, -32.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
        ).repeat(2, 1, 1),
        points=points,
        point_frame=frames.repeat_interleave(50),
        boxes=torch.tensor([[5.0, 1.0, 0, 4, 2, 1.5, 0.1], [8.0, -3.0, 0, 1, 1, 1.7, 2.0]]),
        box_class=torch.tensor([0, 2]),
        box_frame=frames,
        segmentation=torch.randint(2, (2, 2, 16, 16), generator=generator, dtype=torch.uint8),
    )


def make_module(**arguments):
    defaults = {"num_map_classes": 2, "map_classes": ["road", "lane"], "image_size": (32, 64)}
    return FusionModule(**{**defaults, "grid": GRID, **arguments})
