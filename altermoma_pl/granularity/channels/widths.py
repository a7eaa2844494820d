"""From scores of channels and a target to widths. Knows nothing of models."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altermoma_pl.granularity.channels.groups import Kept

Cost = Callable[[Mapping[str, int]], float]
"""Group name -> number of channels that stay, to what that costs."""


class Step(NamedTuple):
    """Removing a block of a group: its mean score, and the width that it leaves."""

    score: float
    group: str
    width: int


def keep_widths(
    scores: Mapping[str, Tensor],
    sparsity: float,
    steps: Mapping[str, int] | None = None,
    min_density: float = 0.0,
    within: Kept | None = None,
    cost: Cost | None = None,
) -> Kept:
    """Remove blocks of channels, those with the lowest mean scores first, until the target is reached.

    Of each group the best channels stay, in a number that is a multiple of its step, or all of them. At least
    the share `sparsity` is removed, and less than one block more than needed. Ties: the later group loses
    first, in a group the later channel.

    Args:
        scores: Group name -> (num_channels,) score of each channel, higher is kept.
        sparsity: Share to remove, in [0, 1): of the channels, or of `cost`.
        steps: Group name -> number of channels of a block; 1 for each if left out.
        min_density: Share of each group that stays whatever its scores, at least one block.
        within: What stayed earlier; what was removed stays removed.
        cost: Makes the target a share of it, for example FLOPs; None for the number of channels.

    Raises:
        ValueError: If the sparsity is out of range, a score of a channel that is there is not finite, or the
            target cannot be reached.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    steps = steps or dict.fromkeys(scores, 1)
    cost = cost or (lambda widths: float(sum(widths.values())))
    order: dict[str, Tensor] = {}  # the channels of each group that are there, the best first
    removals: list[Step] = []
    for name, score in reversed(list(scores.items())):
        there = torch.arange(len(score)) if within is None else within[name].cpu().nonzero().flatten()
        own = score.detach().double().cpu()[there]  # of what is gone, a score may be anything
        if not bool(own.isfinite().all()):
            raise ValueError(f"scores of the channels of {name!r} are not finite")
        ranked, best = own.sort(descending=True, stable=True)
        order[name] = there[best]
        least = round(max(1, min_density * len(score)), 9)  # 0.07 * 100 is more than 7
        floor = math.ceil(least / steps[name]) * steps[name]
        removals += _steps(name, ranked, steps[name], floor)
    # Stable: of equal scores those of the later group go first, and in a group the last.
    removals.sort(key=lambda step: step.score)
    # Rounding must not take one block more than needed, where a share of a cost is no exact number.
    full = cost({name: len(score) for name, score in scores.items()})
    limit = (1 - sparsity) * full * (1 + 1e-12)

    def widths_after(count: int) -> dict[str, int]:
        start = {name: len(order[name]) for name in scores}
        return start | {step.group: step.width for step in removals[:count]}

    # By bisection, since every block that goes costs less; of FLOPs, a cost takes a while.
    count = bisect_left(range(len(removals) + 1), True, key=lambda n: cost(widths_after(n)) <= limit)
    if count > len(removals):
        most = 1 - cost(widths_after(count)) / full
        raise ValueError(
            f"sparsity {sparsity:.4g} cannot be reached: with whole blocks and the floor of each layer "
            f"the most is {most:.4g}; lower round_to, min_density or the sparsity"
        )
    kept = {name: torch.zeros(len(score), dtype=torch.bool) for name, score in scores.items()}
    for name, width in widths_after(count).items():
        kept[name][order[name][:width]] = True
    return kept


def _steps(name: str, ranked: Tensor, step: int, floor: int) -> list[Step]:
    """The blocks of a group that may go, the worst first; their mean scores never fall.

    `ranked` are the scores of the channels that are there, the highest first. Widths become multiples of
    `step`, so that the first block may be a smaller one, and no less than `floor`.
    """
    found: list[Step] = []
    current = len(ranked)
    for width in range((current - 1) // step * step, floor - 1, -step):
        mean = float(ranked[width:current].mean())
        # Equal scores: their mean may fall by rounding, and a narrower width would come first.
        found.append(Step(max(mean, found[-1].score) if found else mean, name, width))
        current = width
    return found
