"""The rules of KITTI's object evaluation, for one frame at a time.

They follow the evaluation code of the benchmark (Geiger, Lenz, Urtasun: "Are we ready for autonomous
driving? The KITTI vision benchmark suite", CVPR 2012) and, for 40 recall points, Simonelli et al.:
"Disentangling monocular 3D object detection", ICCV 2019.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altermoma_pl.metrics.rotated_iou import over_union, rotated_iou_3d, rotated_iou_bev

KITTI_TYPES = (
    "Car", "Pedestrian", "Cyclist", "Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare",
)  # fmt: skip
KITTI_CLASSES = KITTI_TYPES[:3]
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}
DONT_CARE = KITTI_TYPES.index("DontCare")

DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT = (40.0, 25.0, 25.0)  # pixels
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.3, 0.5)

# Overlap that a match must exceed, per class.
STRICT, LOOSE = (0.7, 0.5, 0.5), (0.5, 0.25, 0.25)
MIN_OVERLAP = {"2d": STRICT, "bev": STRICT, "3d": STRICT, "bev_loose": LOOSE, "3d_loose": LOOSE}

RECALL_STEPS = 40
VALID, IGNORED, OTHER = 0, 1, -1


class KittiDetections(NamedTuple):
    """P detections of any number of frames, in any order."""

    boxes: Tensor  # (P, 7): height, width, length, x, y, z, rotation_y, as in a label file: metres and
    # radians in the rectified camera's frame (y down), x, y, z of the centre of the BOTTOM
    boxes2d: Tensor  # (P, 4): left, top, right, bottom in pixels
    scores: Tensor  # (P,), higher is more certain
    types: Tensor  # (P,) integers, index into KITTI_TYPES
    frames: Tensor  # (P,) integers that tell the frames of one update apart


class KittiTargets(NamedTuple):
    """M objects, those of DontCare included. Within a frame their order counts, as in a label file."""

    boxes: Tensor  # (M, 7), as those of KittiDetections
    boxes2d: Tensor  # (M, 4): left, top, right, bottom in pixels
    truncation: Tensor  # (M,) share outside the image, in [0, 1]
    occlusion: Tensor  # (M,) 0 visible, 1 partly, 2 largely occluded, 3 unknown
    types: Tensor  # (M,) integers, index into KITTI_TYPES
    frames: Tensor  # (M,), as those of KittiDetections


def kitti_types(names: Iterable[str]) -> Tensor:
    """(N,) indices into `KITTI_TYPES` of N names, in upper or lower case.

    Raises:
        ValueError: A name is not a type of KITTI.
    """
    index = {name.lower(): position for position, name in enumerate(KITTI_TYPES)}
    names = list(names)
    unknown = [name for name in names if name.lower() not in index]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no type of KITTI; the types are {', '.join(KITTI_TYPES)}.")
    return torch.tensor([index[name.lower()] for name in names], dtype=torch.int64)


def target_flags(targets: KittiTargets, kind: str, height_scale: float = 1.0) -> Tensor:
    """(3, M), per difficulty: whether each of M objects is to be found, may be found, or plays no part.

    VALID for objects of the class that pass its filters; IGNORED for those that fail one and for the
    neighbouring class; else OTHER.
    """
    height = targets.boxes2d[:, 3].double() - targets.boxes2d[:, 1].double()
    # In float32, so that a truncation of .15 passes whatever the precision it comes in.
    fails = height <= _column(MIN_HEIGHT) * height_scale
    fails |= targets.truncation.float() > _column(MAX_TRUNCATION).float()
    fails |= targets.occlusion > _column(MAX_OCCLUSION)
    same = targets.types == KITTI_TYPES.index(kind)
    flags = torch.where(same & ~fails, VALID, torch.where(same, IGNORED, OTHER))
    if kind in NEIGHBOURS:
        flags[:, targets.types == KITTI_TYPES.index(NEIGHBOURS[kind])] = IGNORED
    return flags


def detection_flags(detections: KittiDetections, kind: str, height_scale: float = 1.0) -> Tensor:
    """(3, P), per difficulty: IGNORED if too small, whatever the type; VALID for the class; else OTHER."""
    height = (detections.boxes2d[:, 1].double() - detections.boxes2d[:, 3].double()).abs()
    small = height < _column(MIN_HEIGHT) * height_scale
    same = detections.types == KITTI_TYPES.index(kind)
    return torch.where(small, IGNORED, torch.where(same, VALID, OTHER))


def _column(limits: Sequence[float]) -> Tensor:
    return torch.tensor(limits, dtype=torch.float64)[:, None]


def overlaps(measures: Sequence[str], targets: KittiTargets, detections: KittiDetections) -> Tensor:
    """(L, M, P) float64: overlap of M objects with P detections by L measures of `MIN_OVERLAP`."""
    a, b = _upright(targets.boxes)[:, None], _upright(detections.boxes)
    ground = [0, 1, 3, 4, 6]
    kinds = [measure.removesuffix("_loose") for measure in measures]
    values = {}
    if "2d" in kinds:
        common = _intersection_2d(targets.boxes2d, detections.boxes2d)
        values["2d"] = over_union(common, _area_2d(targets.boxes2d)[:, None], _area_2d(detections.boxes2d))
    if "bev" in kinds:
        values["bev"] = rotated_iou_bev(a[..., ground], b[..., ground])
    if "3d" in kinds:
        values["3d"] = rotated_iou_3d(a, b)
    return torch.stack([values[kind] for kind in kinds])


def _upright(boxes: Tensor) -> Tensor:
    """Camera boxes as (..., 7) x, z, height of the centre, length, width, height, yaw from x to z."""
    height, width, length, x, y, z, rotation_y = boxes.double().unbind(-1)
    return torch.stack([x, z, height / 2 - y, length, width, height, -rotation_y], dim=-1)


def _intersection_2d(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double()[:, None], b.double()
    low, high = torch.maximum(a[..., :2], b[:, :2]), torch.minimum(a[..., 2:], b[:, 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


def _area_2d(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:].double() - boxes[:, :2].double()).prod(dim=-1)


def dont_care_share(targets: KittiTargets, detections: KittiDetections) -> Tensor:
    """(P,): largest share of each detection's image box in one DontCare region."""
    regions = targets.boxes2d[targets.types == DONT_CARE]
    area = _area_2d(detections.boxes2d)
    share = _intersection_2d(detections.boxes2d, regions) / area.where(area > 0, 1.0)[:, None]
    return torch.cat([share, area.new_zeros(len(area), 1)], dim=1).amax(dim=1)


def match_frame(
    close: Tensor, overlap: Tensor, scores: Tensor, covered: Tensor, of_targets: Tensor, flags: Tensor
) -> Tensor:
    """What each detection of a frame adds when the score threshold falls to its score.

    The benchmark matches a frame once per threshold, and the thresholds depend on all frames. But a
    frame's counts only change at its own scores, so matching once per score covers every threshold.

    Args:
        close: (L, M, P), whether the overlap suffices by each measure.
        overlap: (L, M, P).
        scores: (P,), in the order of the file.
        covered: (L, P), detections that are no false positives because they lie in DontCare.
        of_targets: (3, M), as `target_flags` gives them.
        flags: (3, P), as `detection_flags` gives them.

    Returns:
        (P, L, 3, 3), per measure and difficulty: change of the true positives and of the false
        positives, and 1 if the detection is a true positive when all are kept and the most certain
        match wins, which decides on the thresholds.
    """
    takes_part = (of_targets != OTHER)[:, :, None] & (flags != OTHER)[:, None]
    possible = close[:, None] & takes_part  # (L, 3, M, P)
    valid = flags == VALID  # (3, P)
    hit = (of_targets == VALID)[:, :, None] & valid[:, None]  # (3, M, P)
    found = (_take(scores.expand_as(possible), possible) & hit).any(dim=2)  # (L, 3, P)

    seen = scores >= scores[:, None]  # (T, P): detections kept at the threshold of each
    possible = possible[:, :, None] & seen[:, None]  # (L, 3, T, M, P)
    # Valid detections by overlap, and only then ignored ones, in the order of the file.
    key = overlap[:, None].where(valid[:, None], 0.0)[:, :, None]
    taken = _take(key.expand_as(possible), possible)
    tp = (taken & hit[:, None]).sum(dim=(-2, -1))  # (L, 3, T)
    free = seen & valid[:, None] & ~taken.any(dim=-2) & ~covered[:, None, None]
    counts = torch.stack([tp, free.sum(dim=-1)], dim=-1)  # (L, 3, T, 2)
    # Detections with equal scores have equal counts: the first of them carries the change.
    order = scores.argsort(descending=True, stable=True)
    changes = torch.empty_like(counts)
    changes[:, :, order] = counts[:, :, order].diff(dim=2, prepend=torch.zeros_like(counts[:, :, :1]))
    return torch.cat([changes, found[..., None]], dim=-1).permute(2, 0, 1, 3)


def _take(key: Tensor, possible: Tensor) -> Tensor:
    """Which detection each object takes, (..., M, P) as both arguments; none is taken twice.

    Objects choose in turn: the possible detection of the largest key, of equals the first.
    """
    taken = torch.zeros_like(possible)
    free = torch.ones_like(possible.any(dim=-2))
    for row in range(possible.shape[-2]):
        eligible = possible[..., row, :] & free
        best = key[..., row, :].where(eligible, -torch.inf).argmax(dim=-1, keepdim=True)
        taken[..., row, :] = torch.zeros_like(eligible).scatter(-1, best, True) & eligible
        free &= ~taken[..., row, :]
    return taken


def threshold_ranks(num_found: int, num_targets: int) -> list[int]:
    """Which of the true positives' scores, by descending score, become thresholds.

    Each is the score whose recall is closest to the next step of 1 / 40. There are at most 41, and
    the last score is always among them.
    """
    kept, recall = [], 0.0
    for rank in range(num_found):
        left, right = (rank + 1) / num_targets, (rank + 2) / num_targets
        last = rank == num_found - 1
        if last or right - recall >= recall - left:
            kept.append(rank)
            recall += 1 / RECALL_STEPS
    return kept


def recall_precision(scores: Tensor, changes: Tensor, num_targets: int) -> tuple[float, float]:
    """Average precision of one class, measure and difficulty, at 11 and at 40 recall points.

    The precision at the i-th threshold stands for the recall i / 40, whatever the recall there is.
    `scores` are (E,), descending; `changes` (E, 3), as `match_frame` gives them.
    """
    steps = torch.zeros(RECALL_STEPS + 1, dtype=torch.float64)
    found = scores[changes[:, 2] > 0]
    thresholds = found[threshold_ranks(len(found), num_targets)]
    last = torch.searchsorted(-scores, -thresholds, right=True) - 1
    tp, fp = changes[:, :2].double().cumsum(dim=0)[last].unbind(dim=1)
    steps[: len(thresholds)] = tp / (tp + fp).clamp(min=1)
    envelope = steps.flip(0).cummax(dim=0).values.flip(0)
    return envelope[::4].mean().item(), envelope[1:].mean().item()
