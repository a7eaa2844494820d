"""Errors of matched boxes: how far off is what was found (Caesar et al., CVPR 2020, section 3.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from altermoma_pl.metrics.matching import FIRST_POINT, interpolate, recall_points

ERRORS = ("ate", "ase", "aoe", "ave", "aae")
UNKNOWN = -1  # the attribute of a box without one


class Boxes(NamedTuple):
    """Predictions or targets of an update."""

    boxes: Tensor  # (N, 7 or 9) float32: x, y, z, three sizes, yaw, and if known the x and y of the velocity
    classes: Tensor  # (N,)
    frames: Tensor  # (N,)
    attributes: Tensor  # (N,)

    def take(self, index: Tensor) -> "Boxes":
        """Those of a mask or of indices."""
        return Boxes(*(tensor[index] for tensor in self))


def box_errors(found: Boxes, targets: Boxes, periods: Tensor) -> Tensor:
    """The five errors of matched pairs.

    Args:
        found: N predictions.
        targets: The N targets that they take.
        periods: (N,), the period of each yaw in radians.

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
    """Errors of one class, averaged over recalls.

    The running mean at a recall is the one at the score with which that recall is reached.

    Args:
        matched: (P,) bool, true positives by descending score.
        scores: (P,), descending.
        errors: (P, E), finite or NaN (unknown) where `matched`.
        num_targets: Number of ground truths.

    Returns:
        (E,) in float64; 1 if the recall does not exceed 10 %.
    """
    ones = torch.ones(errors.shape[1], dtype=torch.float64)
    if not matched.any():
        return ones
    recall = matched.double().cumsum(0) / num_targets
    reached = interpolate(recall_points(), recall, scores.double(), beyond=0.0)
    # A score of exactly 0 counts as not reached, as in the official evaluation.
    last = int(reached.nonzero().max()) if reached.any() else 0
    if last < FIRST_POINT:
        return ones
    # Ascending, as interpolation needs it.
    points, known = reached.flip(0), scores[matched].double().flip(0)
    means = running_mean(errors[matched]).flip(0)
    curves = torch.stack([interpolate(points, known, column).flip(0) for column in means.T])
    return curves[:, FIRST_POINT : last + 1].mean(dim=1)


def running_mean(errors: Tensor) -> Tensor:
    """Mean down to each row without NaN.

    Args:
        errors: (K, E).

    Returns:
        (K, E) in float64; 0 above the first number of a column, 1 in a column without numbers.
    """
    known = ~errors.isnan()
    means = errors.double().nan_to_num(0.0).cumsum(0) / known.cumsum(0).clamp(min=1)
    return means.masked_fill(~known.any(dim=0), 1.0)
