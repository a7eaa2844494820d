"""Widths and depths of the example model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Every width, depth and resolution that grows with the machine."""

    camera_stem: int
    camera_widths: tuple[int, ...]  # at strides 4, 8, 16
    camera_blocks: tuple[int, ...]
    neck: int
    depth_step: float  # metres
    camera_bev: int  # channels of the lifted image
    pillar: int
    pillars_per_cell: int  # pillars along one side of a BEV cell
    lidar_widths: tuple[int, ...]  # at the BEV cell and twice the BEV cell
    lidar_blocks: tuple[int, ...]
    lidar_bev: int
    fuser: int
    decoder: int
    head: int


SIZES = {
    # For two CPU cores. The backbones hold most of the weights: they are what is pruned.
    "small": ModelSize(
        camera_stem=16,
        camera_widths=(24, 48, 96),
        camera_blocks=(2, 2, 2),
        neck=48,
        depth_step=1.0,
        camera_bev=24,
        pillar=24,
        pillars_per_cell=2,
        lidar_widths=(64, 96),
        lidar_blocks=(1, 4),
        lidar_bev=32,
        fuser=32,
        decoder=48,
        head=32,
    ),
    # For one GPU.
    "large": ModelSize(
        camera_stem=64,
        camera_widths=(64, 128, 256),
        camera_blocks=(3, 4, 6),
        neck=256,
        depth_step=0.5,
        camera_bev=80,
        pillar=64,
        pillars_per_cell=2,
        lidar_widths=(128, 256),
        lidar_blocks=(5, 9),
        lidar_bev=256,
        fuser=256,
        decoder=384,
        head=256,
    ),
}
