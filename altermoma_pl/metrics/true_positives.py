"""Errors of matched boxes: how far off is what was found (Caesar et al., CVPR 2020, section 3.1)."""

import torch
from torch import Tensor

from altermoma_pl.metrics.matching import FIRST_RECALL, RECALLS, UNKNOWN, Boxes, interpolate

ERRORS = ("ate", "ase", "aoe", "ave", "aae")


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
    # Ascending, as interpolation needs it.
    points, known = reached.flip(0), scores[matched].double().flip(0)
    means = _running_mean(errors[matched]).flip(0)
    curves = torch.stack([interpolate(points, known, column).flip(0) for column in means.T])
    return curves[:, FIRST_RECALL : last + 1].mean(dim=1)


def _running_mean(errors: Tensor) -> Tensor:
    """Mean down to each row without NaN: 0 above a column's first number, 1 in one without numbers."""
    known = ~errors.isnan()
    means = errors.double().nan_to_num(0.0).cumsum(0) / known.cumsum(0).clamp(min=1)
    return means.masked_fill(~known.any(dim=0), 1.0)
