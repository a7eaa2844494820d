"""From label files and from detections in the LiDAR frame to the inputs of `KittiAP`.

    metric = KittiAP()
    for each batch, whose frames are called `ids`:
        references = [read_reference(root, frame) for frame in ids]
        found = detections_to_labels(*model.detections(output), references)
        metric.update(kitti_detections(found), kitti_targets([r.labels for r in references]))

The lists of labels in between can be written by `write_labels` as the benchmark's result files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from altermoma_pl.metrics import KittiDetections, KittiTargets, kitti_types
from examples.data.batch import CLASSES
from examples.data.geometry import Floats, box_corners
from examples.data.kitti import Calibration, Label, box_to_label, frame_files, read_calib, read_labels

_NEAREST = 0.1  # metres: what is closer to the camera is cut off before the projection


class Reference(NamedTuple):
    """What a frame's detections are held against."""

    labels: list[Label]
    calibration: Calibration
    image_size: tuple[int, int]  # height, width of the unresized image


def read_reference(root: Path, frame: str) -> Reference:
    """The reference of one frame of a KITTI root."""
    files = frame_files(root, frame)
    with Image.open(files.image) as image:
        size = image.height, image.width
    return Reference(read_labels(files.label), read_calib(files.calib), size)


def kitti_targets(frames: Sequence[Sequence[Label]]) -> KittiTargets:
    """Ground truth of B frames, whose lists of labels are complete and in the order of the file."""
    boxes, boxes2d, types, owners = _tensors(frames)
    labels = [label for frame in frames for label in frame]
    truncation = torch.tensor([label.truncation for label in labels])
    occlusion = torch.tensor([label.occlusion for label in labels], dtype=torch.int64)
    return KittiTargets(boxes, boxes2d, truncation, occlusion, types, owners)


def kitti_detections(frames: Sequence[Sequence[Label]]) -> KittiDetections:
    """Detections of B frames.

    Raises:
        ValueError: A label has no score.
    """
    scores = []
    for label in (label for frame in frames for label in frame):
        if label.score is None:
            raise ValueError(f"a detection needs a score, but this label has none: {label}")
        scores.append(label.score)
    boxes, boxes2d, types, owners = _tensors(frames)
    return KittiDetections(boxes, boxes2d, torch.tensor(scores), types, owners)


def _tensors(frames: Sequence[Sequence[Label]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (N, 7), image boxes (N, 4), types (N,) and frames (N,); floats as exact as the files."""
    labels = [label for frame in frames for label in frame]
    boxes = [[*label.dimensions, *label.location, label.rotation_y] for label in labels]
    owners = [index for index, frame in enumerate(frames) for _ in frame]
    return (
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 7),
        torch.tensor([label.box2d for label in labels], dtype=torch.float64).reshape(-1, 4),
        kitti_types(label.kind for label in labels),
        torch.tensor(owners, dtype=torch.int64),
    )


def detections_to_labels(
    boxes: Tensor, scores: Tensor, classes: Tensor, frames: Tensor, references: Sequence[Reference]
) -> list[list[Label]]:
    """Labels of the detections of B frames, with the image boxes that the benchmark asks for.

    Args:
        boxes: (P, 7) in the LiDAR frame.
        scores: (P,).
        classes: (P,) indices into CLASSES.
        frames: (P,) in [0, B).
        references: B references, of which calibration and image size are used.

    Returns:
        B lists. A detection that the camera does not see gets an image box without any area, which
        the benchmark ignores as too small.
    """
    labels: list[list[Label]] = [[] for _ in references]
    columns = boxes.detach().cpu().double().numpy(), scores.tolist(), classes.tolist(), frames.tolist()
    for box, score, index, frame in zip(*columns, strict=True):
        calibration, size = references[frame].calibration, references[frame].image_size
        box2d = image_box(box, calibration.lidar_to_image(), size)
        labels[frame].append(box_to_label(CLASSES[index], box, calibration, box2d=box2d, score=score))
    return labels


def image_box(
    box: Floats, lidar_to_image: Floats, image_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a (7,) box as the camera sees it, clipped to (height, width).

    Without any part in front of the camera it is all zeros.
    """
    corners = box_corners(box[None])[0] @ lidar_to_image[:, :3].T + lidar_to_image[:, 3]  # (8, 3)
    depth = corners[:, 2]
    # Where the segments between corners pass the nearest depth; they all lie in the box.
    ahead, behind = corners[depth >= _NEAREST], corners[depth < _NEAREST]
    share = (ahead[:, None, 2] - _NEAREST) / (ahead[:, None, 2] - behind[:, 2])
    cut = ahead[:, None] + share[..., None] * (behind - ahead[:, None])
    seen = np.concatenate([ahead, cut.reshape(-1, 3)])
    if not len(seen):
        return 0.0, 0.0, 0.0, 0.0
    pixels = seen[:, :2] / seen[:, 2:]
    height, width = image_size
    inside = np.clip([pixels.min(axis=0), pixels.max(axis=0)], 0, [width, height])
    left, top, right, bottom = inside.ravel().tolist()
    return left, top, right, bottom
