"""Frames in memory, the order in which an epoch visits them, and how they make a batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from examples.data.batch import Batch
from examples.data.geometry import in_grid, in_view, rasterise
from examples.data.kitti import (
    frame_files,
    labels_to_boxes,
    read_calib,
    read_image,
    read_labels,
    read_points,
)
from examples.data.synthetic import read_static_maps
from examples.grid import BEVGrid


class Frame(NamedTuple):
    """One frame: the fields of `Batch` without the batch."""

    image: Tensor  # (3, H, W) uint8
    lidar_to_image: Tensor  # (3, 4) float32
    points: Tensor  # (N, 4) float32
    boxes: Tensor  # (M, 7) float32
    box_class: Tensor  # (M,) int64
    segmentation: Tensor  # (S, nx, ny) uint8


def flip(frame: Frame) -> Frame:
    """Mirror the world left to right: its own inverse.

    The image stays as it is; the projection mirrors points back before they are projected.
    """
    mirror = torch.tensor([1.0, -1.0, 1.0, 1.0])
    return frame._replace(
        lidar_to_image=frame.lidar_to_image * mirror,
        points=frame.points * mirror,
        boxes=frame.boxes * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0]),
        segmentation=frame.segmentation.flip(-1),
    )


def collate(frames: Sequence[Frame]) -> Batch:
    """Stack what has the same shape in every frame, concatenate points and boxes."""
    return Batch(
        image=torch.stack([frame.image for frame in frames]),
        lidar_to_image=torch.stack([frame.lidar_to_image for frame in frames]),
        points=torch.cat([frame.points for frame in frames]),
        point_frame=_owners([len(frame.points) for frame in frames]),
        boxes=torch.cat([frame.boxes for frame in frames]),
        box_class=torch.cat([frame.box_class for frame in frames]),
        box_frame=_owners([len(frame.boxes) for frame in frames]),
        segmentation=torch.stack([frame.segmentation for frame in frames]),
    )


def _owners(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


class DrivingDataset(Dataset[Frame]):
    """Frames of a KITTI root, decoded once and kept in memory.

    Points are cropped to the grid and to the camera's view, boxes to those whose centre lies over
    the grid; the maps also show the part of a box that reaches into it. All calibrations and labels
    are parsed at once, so that a bad file is an error before anything is trained.

    Args:
        root: Folder that holds `training/`.
        frames: Frame ids.
        image_size: Height and width that images are resized to.
        grid: Grid of the maps, and crop.
        static_maps: Whether to put the synthetic data's maps of the ground before those drawn from
            the boxes.
    """

    def __init__(
        self,
        root: Path,
        frames: Sequence[str],
        image_size: tuple[int, int],
        grid: BEVGrid,
        static_maps: bool,
    ) -> None:
        self.root = root
        self.frames = tuple(frames)
        self.image_size = image_size
        self.grid = grid
        self.static_maps = static_maps
        self._files = [frame_files(root, frame) for frame in self.frames]
        self._calibrations = [read_calib(files.calib) for files in self._files]
        self._labels = [read_labels(files.label) for files in self._files]
        self._decoded: dict[int, Frame] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: int | tuple[int, bool]) -> Frame:
        """The frame of an index, or of (index, whether to flip it)."""
        index, flipped = key if isinstance(key, tuple) else (key, False)
        if index not in self._decoded:
            self._decoded[index] = self._decode(index)
        frame = self._decoded[index]
        return flip(frame) if flipped else frame

    def _decode(self, index: int) -> Frame:
        files, calibration = self._files[index], self._calibrations[index]
        image, scale = read_image(files.image, self.image_size)
        lidar_to_image = calibration.lidar_to_image(scale)
        points = read_points(files.velodyne)
        points = points[in_grid(points, self.grid)]
        points = points[in_view(points, lidar_to_image, self.image_size)]
        boxes, classes = labels_to_boxes(self._labels[index], calibration)
        maps = rasterise(boxes, classes, self.grid)
        if self.static_maps:
            static = read_static_maps(self.root, self.frames[index], self.grid)
            maps = np.concatenate([static, maps])
        kept = in_grid(boxes, self.grid)
        return Frame(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            lidar_to_image=torch.from_numpy(lidar_to_image).float(),
            points=torch.from_numpy(points),
            boxes=torch.from_numpy(boxes[kept]).float(),
            box_class=torch.from_numpy(classes[kept]),
            segmentation=torch.from_numpy(maps),
        )


class EpochSampler(Sampler[tuple[int, bool]]):
    """A random order, and random flips, that depend on nothing but (seed, epoch).

    Flips are drawn here and not in the dataset, so that they do not depend on how many workers
    load the frames. Lightning calls `set_epoch`, so a resumed run sees the order of an
    uninterrupted one.

    Args:
        num_frames: Length of the dataset.
        seed: Of all epochs.
        flip: Whether half of the frames are flipped.
    """

    def __init__(self, num_frames: int, seed: int, flip: bool) -> None:
        self.num_frames = num_frames
        self.seed = seed
        self.flip = flip
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that the next iteration visits."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.num_frames)
        flipped = rng.random(self.num_frames) < (0.5 if self.flip else 0.0)
        yield from zip(order.tolist(), flipped.tolist(), strict=True)
