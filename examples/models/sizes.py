"""Widths and depths of the example model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Every width, depth and resolution that grows with the machine."""

    camera_stem: int
    camera_widths: tuple[int, ...]  # of three stages after the stem, which has stride 2
    camera_blocks: tuple[int, ...]
    camera_strides: tuple[int, ...]  # of the stages; the last two are what is lifted
    neck: int
    depth_step: float  # metres
    camera_bev: int  # channels of the lifted image
    by_column: bool  # whether a lifted column of pixels falls in one cell: cheap, for level cameras
    pillar: int
    pillars_per_cell: int  # pillars along one side of a BEV cell
    lidar_widths: tuple[int, ...]  # at the BEV cell and twice the BEV cell
    lidar_blocks: tuple[int, ...]
    lidar_bev: int
    fuser: int
    decoder: int
    head: int


SIZES = {
    # For benchmarks on one core, with images of 48 x 160 and 24 x 24 cells: seconds per training. The
    # image is lifted at stride 4, as there are few pixels.
    "tiny": ModelSize(
        camera_stem=16,
        camera_widths=(16, 32, 64),
        camera_blocks=(1, 1, 2),
        camera_strides=(1, 2, 2),
        neck=32,
        depth_step=1.0,
        camera_bev=16,
        by_column=True,
        pillar=16,
        pillars_per_cell=1,
        lidar_widths=(32, 64),
        lidar_blocks=(2, 3),
        lidar_bev=16,
        fuser=24,
        decoder=32,
        head=16,
    ),
    # For two CPU cores. The backbones hold most of the weights: they are what is pruned.
    "small": ModelSize(
        camera_stem=16,
        camera_widths=(24, 48, 96),
        camera_blocks=(2, 2, 2),
        camera_strides=(2, 2, 2),
        neck=48,
        depth_step=1.0,
        camera_bev=24,
        by_column=True,
        pillar=24,
        pillars_per_cell=2,
        lidar_widths=(64, 96),
        lidar_blocks=(1, 4),
        lidar_bev=32,
        fuser=32,
        decoder=48,
        head=32,
    ),
    # For a few CPU cores: three times the widths of "small", in multiples of 16, so that convolutions take
    # most of the time.
    "medium": ModelSize(
        camera_stem=48,
        camera_widths=(64, 144, 288),
        camera_blocks=(2, 2, 2),
        camera_strides=(2, 2, 2),
        neck=144,
        depth_step=1.0,
        camera_bev=64,
        by_column=True,
        pillar=64,
        pillars_per_cell=2,
        lidar_widths=(192, 288),
        lidar_blocks=(1, 4),
        lidar_bev=96,
        fuser=96,
        decoder=144,
        head=96,
    ),
    # For one GPU.
    "large": ModelSize(
        camera_stem=64,
        camera_widths=(64, 128, 256),
        camera_blocks=(3, 4, 6),
        camera_strides=(2, 2, 2),
        neck=256,
        depth_step=0.5,
        camera_bev=80,
        by_column=False,
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
