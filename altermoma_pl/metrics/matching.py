"""What the metrics of centre distance share: checked boxes, matching, precision over recall.

The rules are those of the nuScenes detection task (Caesar et al., CVPR 2020, section 3.1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altermoma_pl.metrics.rows import by_score

RECALLS = torch.arange(101, dtype=torch.float64) * (1 / 100)  # at which curves are sampled
FIRST_RECALL = 11  # recalls up to 10 % are noise and do not count
MIN_PRECISION = 0.1
UNKNOWN = -1  # the attribute of a box without one


class Boxes(NamedTuple):
    """The predictions or the targets of an update."""

    boxes: Tensor  # (N, 2 or more) float32, x and y of the centre first
    classes: Tensor  # (N,)
    frames: Tensor  # (N,)
    attributes: Tensor  # (N,)

    def take(self, index: Tensor) -> "Boxes":
        """Those of a mask or of indices."""
        return Boxes(*(tensor[index] for tensor in self))


def checked_boxes(
    side: str,
    name: str,
    width: int,
    num_classes: int,
    boxes: Tensor,
    classes: Tensor,
    frames: Tensor,
    *others: Tensor | None,
    attributes: Tensor | None = None,
) -> Boxes:
    """The `name` (boxes or centres) of one side, cut to `width` columns, if its tensors fit together.

    `others` must be (N,) too; of the attributes, None is UNKNOWN for all.

    Raises:
        ValueError: A shape is another, or a class is out of range.
    """
    if boxes.ndim != 2 or boxes.shape[1] < width:
        raise ValueError(
            f"{name.capitalize()} of the {side} must be (N, {width} or more), got {tuple(boxes.shape)}."
        )
    columns = [tensor for tensor in (classes, *others, frames, attributes) if tensor is not None]
    shapes = [tuple(tensor.shape) for tensor in columns]
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
    if attributes is None:
        attributes = torch.full_like(classes, UNKNOWN)
    return Boxes(boxes[:, :width].detach().float(), classes, frames, attributes)


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
    """Average precision of one class, mean over distances: a float32 scalar in [0, 1].

    Args:
        matched: (P, T), 1 for the true positives at each of T distances, by descending score.
        num_targets: Number of targets of the class.
    """
    return torch.stack([_average_precision(column, num_targets) for column in matched.T]).mean()


def _average_precision(matched: Tensor, num_targets: int) -> Tensor:
    if not matched.any():
        return torch.tensor(0.0)
    tp = matched.double().cumsum(0)
    precision = tp / torch.arange(1, len(tp) + 1)
    sampled = interpolate(RECALLS, tp / num_targets, precision, beyond=0.0)[FIRST_RECALL:]
    return ((sampled - MIN_PRECISION).clamp(min=0).mean() / (1 - MIN_PRECISION)).float()


def interpolate(x: Tensor, xp: Tensor, fp: Tensor, beyond: float | None = None) -> Tensor:
    """Piecewise linear fp(xp) at x; on the right of xp it is `beyond`, fp[-1] if None."""
    return torch.from_numpy(np.interp(x.numpy(), xp.numpy(), fp.numpy(), right=beyond))
