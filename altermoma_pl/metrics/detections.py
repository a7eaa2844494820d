"""What the metrics of detections share: their state, checked boxes, matching, curves over recall.

But for the state, the rules are those of nuScenes (Caesar et al., CVPR 2020, section 3.1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RECALLS = torch.arange(101, dtype=torch.float64) * (1 / 100)  # at which curves are sampled
FIRST_RECALL = 11  # recalls up to 10 % are noise and do not count
MIN_PRECISION = 0.1
UNKNOWN = -1  # the attribute of a box without one
ERRORS = ("ate", "ase", "aoe", "ave", "aae")


class RowMetric(Metric):
    """A metric of rows: a prediction's score, its class, and what the metric adds.

    Rows are stored flat and in float32: a process without a single update takes part in the gathering
    with an empty tensor, which torchmetrics makes one-dimensional and float32, and gathering needs the
    same of all processes. The numbers of targets have the given shape, classes first.
    """

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor]
    num_targets: Tensor

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("num_targets", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_rows(self, *columns: Tensor) -> None:
        """Add N rows, of columns (N, ...)."""
        table = torch.cat([column[:, None].flatten(1) for column in columns], dim=1)
        self.rows.append(table.float().flatten().to(self.device))

    def _rows_by_class(self, width: int) -> list[Tensor]:
        """The rows of each class, (N, `width`) by descending score.

        On the CPU, because what is made of them needs float64, which some accelerators lack.
        """
        flat = dim_zero_cat(self.rows).cpu() if len(self.rows) else torch.empty(0)
        rows = flat.reshape(-1, width)
        rows = rows[by_score(rows[:, 0])]
        return [rows[rows[:, 1] == index] for index in range(len(self.num_targets))]


def by_score(scores: Tensor) -> Tensor:
    """Indices by descending score; among equals the larger index first, as on nuScenes."""
    return len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)


class Boxes(NamedTuple):
    """The predictions or the targets of an update."""

    boxes: Tensor  # (N, 2 or more) float32, x and y of the centre first
    classes: Tensor  # (N,)
    frames: Tensor  # (N,)
    attributes: Tensor = torch.empty(0)  # (N,), UNKNOWN where a box has none; only errors need them

    def take(self, index: Tensor) -> "Boxes":
        """Those of a mask or of indices."""
        return Boxes(*(tensor[index] for tensor in self))


def checked_boxes(
    side: str, name: str, width: int, num_classes: int, boxes: Tensor, classes: Tensor, *others: Tensor | None
) -> Tensor:
    """The `name` (boxes or centres) of one side, cut to `width` columns; the others must be (N,) too.

    Raises:
        ValueError: A shape is another, or a class is out of range.
    """
    if boxes.ndim != 2 or boxes.shape[1] < width:
        raise ValueError(
            f"{name.capitalize()} of the {side} must be (N, {width} or more), got {tuple(boxes.shape)}."
        )
    shapes = [tuple(tensor.shape) for tensor in (classes, *others) if tensor is not None]
    if any(shape != (len(boxes),) for shape in shapes):
        raise ValueError(
            f"The {side} have {len(boxes)} {name}, so every other tensor of the {side} "
            f"must have shape ({len(boxes)},), got {shapes}."
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"Classes of the {side} must lie in [0, {num_classes}), "
            f"got {int(classes.min())} to {int(classes.max())}."
        )
    return boxes[:, :width].detach().float()


def checked_distances(distances: Sequence[float]) -> tuple[float, ...]:
    """The matching distances of a metric; none, or one that is not positive, is refused."""
    if not distances or min(distances) <= 0:
        raise ValueError(f"distances must be one or more positive numbers, got {distances}.")
    return tuple(distances)


def match(found: Boxes, scores: Tensor, targets: Boxes, limits: Sequence[float]) -> Tensor:
    """Let P predictions take their closest free target of frame and class by descending score.

    Returns:
        (P, T), the index of the target that the prediction takes at each of T limits, strictly nearer
        than the limit on the ground; -1 if none.
    """
    offset = found.boxes[:, None, :2] - targets.boxes[:, :2]  # (P, M, 2)
    same = (found.classes[:, None] == targets.classes) & (found.frames[:, None] == targets.frames)
    distance = offset[..., 0].hypot(offset[..., 1]).masked_fill(~same, torch.inf)
    taken = torch.full((len(scores), len(limits)), -1, device=distance.device)
    if distance.numel() == 0:
        return taken
    limit = distance.new_tensor(limits)
    free = torch.ones(len(limits), distance.shape[1], dtype=torch.bool, device=distance.device)
    rows = torch.arange(len(limits), device=distance.device)
    order = by_score(scores)
    # Predictions far from everything match nothing whatever is free: skipping them is exact.
    for index in order[distance[order].amin(dim=1) < limit.max()].tolist():
        nearest, closest = distance[index].where(free, torch.inf).min(dim=1)  # (T,), (T,)
        hit = nearest < limit
        taken[index] = closest.where(hit, -1)
        free[rows, closest] &= ~hit
    return taken


def mean_precision(matched: Tensor, num_targets: int) -> Tensor:
    """Average precision of one class, mean over T distances: a float32 scalar in [0, 1].

    `matched` is (P, T), 1 for the true positives at each distance, by descending score.
    """
    values = []
    for tp in matched.double().cumsum(0).T:
        precision = tp / torch.arange(1, len(tp) + 1)
        sampled = torch.zeros(1, dtype=torch.float64)
        if len(tp) and tp[-1] > 0:
            sampled = interpolate(RECALLS, tp / num_targets, precision, beyond=0.0)[FIRST_RECALL:]
        values.append(((sampled - MIN_PRECISION).clamp(min=0).mean() / (1 - MIN_PRECISION)).float())
    return torch.stack(values).mean()


def box_errors(found: Boxes, targets: Boxes, periods: Tensor) -> Tensor:
    """The five errors of N matched pairs, whose yaws have the given periods in radians.

    Boxes are x, y, z, three sizes, yaw, and if known the x and y of the velocity.

    Returns:
        (N, 5) in the order of `ERRORS`, NaN where a target's velocity or attribute is unknown.
    """
    box, goal = found.boxes, targets.boxes
    size, goal_size = box[:, 3:6], goal[:, 3:6]
    shared = torch.minimum(size, goal_size).prod(dim=1)
    scale_iou = shared / (size.prod(dim=1) + goal_size.prod(dim=1) - shared)
    turn = (goal[:, 6] - box[:, 6] + periods / 2).remainder(periods) - periods / 2
    offset = box - goal
    wrong = (found.attributes != targets.attributes).float()
    columns = (
        offset[:, 0].hypot(offset[:, 1]),
        1 - scale_iou,
        turn.abs(),
        offset[:, 7].hypot(offset[:, 8]) if offset.shape[1] > 8 else torch.full_like(turn, torch.nan),
        wrong.masked_fill(targets.attributes == UNKNOWN, torch.nan),
    )
    return torch.stack(columns, dim=1)


def mean_errors(matched: Tensor, scores: Tensor, errors: Tensor, num_targets: int) -> Tensor:
    """Errors of one class, averaged over recalls: (E,) in float64; 1 if no recall exceeds 10 %.

    The running mean at a recall is the one at the score with which that recall is reached.

    Args:
        matched: (P,) bool, true positives by descending score.
        scores: (P,), descending.
        errors: (P, E), finite or NaN (unknown) where `matched`.
        num_targets: Number of targets of the class.
    """
    ones = torch.ones(errors.shape[1], dtype=torch.float64)
    if not matched.any():
        return ones
    recall = matched.double().cumsum(0) / num_targets
    reached = interpolate(RECALLS, recall, scores.double(), beyond=0.0)
    # A score of exactly 0 counts as not reached, as in the official evaluation.
    last = int(reached.nonzero().max()) if reached.any() else 0
    if last < FIRST_RECALL:
        return ones
    errors = errors[matched]
    known = ~errors.isnan()
    # Down to each row, without NaN: 0 above a column's first number, 1 in a column without numbers.
    means = errors.double().nan_to_num(0.0).cumsum(0) / known.cumsum(0).clamp(min=1)
    means = means.masked_fill(~known.any(dim=0), 1.0)
    # Ascending, as interpolation needs it.
    points, at = reached.flip(0), scores[matched].double().flip(0)
    curves = torch.stack([interpolate(points, at, column).flip(0) for column in means.flip(0).T])
    return curves[:, FIRST_RECALL : last + 1].mean(dim=1)


def interpolate(x: Tensor, xp: Tensor, fp: Tensor, beyond: float | None = None) -> Tensor:
    """Piecewise linear fp(xp) at x; on the right of xp it is `beyond`, fp[-1] if None."""
    return torch.from_numpy(np.interp(x.numpy(), xp.numpy(), fp.numpy(), right=beyond))
