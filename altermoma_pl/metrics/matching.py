"""What the metrics of centre distance share: matching, precision over recall, their states.

The rules are those of the nuScenes detection task (Caesar et al., CVPR 2020, section 3.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

RECALL_POINTS = 101
FIRST_POINT = 11  # recalls up to 10 % are noise and do not count
MIN_PRECISION = 0.1


def check_side(
    side: str,
    name: str,
    rows: Tensor,
    width: int,
    classes: Tensor,
    others: Sequence[Tensor],
    num_classes: int,
) -> None:
    """Refuse predictions or targets whose tensors do not fit together.

    Args:
        side: "predictions" or "targets", for the message.
        name: What `rows` holds, in lower case, for the message.
        rows: Should be (N, `width` or more).
        width: Columns that are needed.
        classes: Should be (N,), integers in [0, `num_classes`).
        others: Should be (N,) each.
        num_classes: Number of classes C.

    Raises:
        ValueError: A shape or a class is another.
    """
    if rows.ndim != 2 or rows.shape[1] < width:
        raise ValueError(
            f"{name.capitalize()} of the {side} must be (N, {width} or more), got {tuple(rows.shape)}."
        )
    shapes = [tuple(tensor.shape) for tensor in (classes, *others)]
    if any(shape != (len(rows),) for shape in shapes):
        raise ValueError(
            f"The {side} have {len(rows)} {name}, so every other tensor of the {side} "
            f"must have shape ({len(rows)},), got {shapes}."
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"Classes of the {side} must lie in [0, {num_classes}), "
            f"got {int(classes.min())} to {int(classes.max())}."
        )


def centre_distance(
    centres: Tensor,
    classes: Tensor,
    frames: Tensor,
    target_centres: Tensor,
    target_classes: Tensor,
    target_frames: Tensor,
) -> Tensor:
    """Distances on the ground between predictions and targets of one frame and class.

    Args:
        centres: (P, 2 or more), x and y first.
        classes: (P,).
        frames: (P,).
        target_centres: (M, 2 or more), x and y first.
        target_classes: (M,).
        target_frames: (M,).

    Returns:
        (P, M) in the unit of the centres, infinite where frame or class differ.
    """
    offset = centres[:, None, :2].float() - target_centres[:, :2].float()  # (P, M, 2)
    same = (classes[:, None] == target_classes) & (frames[:, None] == target_frames)
    return offset[..., 0].hypot(offset[..., 1]).masked_fill(~same, torch.inf)


def greedy_match(distance: Tensor, scores: Tensor, limits: Sequence[float]) -> Tensor:
    """Let predictions take their closest free ground truth by descending score.

    Args:
        distance: (P, M), infinite where a pair may not match.
        scores: (P,).
        limits: T distances; a match is strictly nearer.

    Returns:
        (P, T), the index of the ground truth that the prediction takes at that limit, -1 if none.
    """
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


def by_score(scores: Tensor) -> Tensor:
    """Indices by descending score; among equals the larger index first, as on nuScenes."""
    return len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)


def average_precision(matched: Tensor, num_targets: int) -> Tensor:
    """Average precision of one class at one distance.

    Args:
        matched: (P,), true positives by descending score.
        num_targets: Number of ground truths.

    Returns:
        A float32 scalar in [0, 1].
    """
    if not matched.any():
        return torch.tensor(0.0)
    tp = matched.double().cumsum(0)
    precision = tp / torch.arange(1, len(tp) + 1)
    sampled = interpolate(recall_points(), tp / num_targets, precision, beyond=0.0)[FIRST_POINT:]
    return ((sampled - MIN_PRECISION).clamp(min=0).mean() / (1 - MIN_PRECISION)).float()


def recall_points() -> Tensor:
    """The recalls at which curves are sampled: (101,) in float64, 0 to 1."""
    return torch.arange(RECALL_POINTS, dtype=torch.float64) * (1 / (RECALL_POINTS - 1))


def interpolate(x: Tensor, xp: Tensor, fp: Tensor, beyond: float | None = None) -> Tensor:
    """Piecewise linear fp(xp) at x; on the left of xp it is fp[0].

    Where xp repeats a value, its last fp counts.

    Args:
        x: (N,).
        xp: (K,), ascending, at least one.
        fp: (K,).
        beyond: Value on the right of xp, fp[-1] if None.

    Returns:
        (N,).
    """
    left = (torch.searchsorted(xp, x, right=True) - 1).clamp(min=0)
    right = (left + 1).clamp(max=len(xp) - 1)
    width = xp[right] - xp[left]
    # In the order of numpy.interp: one rounding off can fall on the other side of a repeated xp.
    slope = (fp[right] - fp[left]) / width.where(width > 0, 1)
    value = slope * (x - xp[left]).clamp(min=0) + fp[left]
    return value if beyond is None else value.where(x <= xp[-1], beyond)


def flat_rows(*columns: Tensor) -> Tensor:
    """Columns side by side, row after row in one flat float32 tensor: an entry of a list state.

    A process without a single update takes part in the gathering with an empty tensor, which
    torchmetrics makes one-dimensional and float32; gathering needs the same of all processes.

    Args:
        *columns: (N,) or (N, k) each.

    Returns:
        (N * width,).
    """
    table = [column[:, None] if column.ndim == 1 else column for column in columns]
    return torch.cat(table, dim=1).float().flatten()


def read_rows(state: list[Tensor] | Tensor, width: int) -> Tensor:
    """The rows of a list state of `flat_rows`, (N, width), on the CPU.

    On the CPU because interpolation needs float64, which some accelerators lack.
    """
    flat = dim_zero_cat(state).cpu() if len(state) else torch.empty(0)
    return flat.reshape(-1, width)
