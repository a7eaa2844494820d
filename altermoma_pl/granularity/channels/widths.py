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
    """Removing the worst block of a group."""

    score: float
    group: str
    width: int  # that it leaves


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
    alive = within or {name: torch.ones(len(score), dtype=torch.bool) for name, score in scores.items()}
    steps = steps or dict.fromkeys(scores, 1)
    order, todo = {}, []
    for index, (name, score) in enumerate(scores.items()):
        own = score.detach().double().cpu().masked_fill(~alive[name].cpu(), -torch.inf)
        width = int(alive[name].sum())
        order[name] = own.argsort(descending=True, stable=True)
        ranked = own[order[name]]
        if not bool(ranked[:width].isfinite().all()):
            raise ValueError(f"scores of the channels of {name!r} are not finite")
        floor = _floor(len(score), steps[name], min_density)
        todo += [(-index, step) for step in _steps(name, ranked, width, steps[name], floor)]
    removals = [step for _, step in sorted(todo, key=lambda each: (each[1].score, each[0], -each[1].width))]
    full = {name: len(score) for name, score in scores.items()}
    cost = cost or _number
    limit = (1 - sparsity) * cost(full) * (1 + 1e-12)
    start = {name: int(alive[name].sum()) for name in scores}

    def cost_after(count: int) -> float:
        return cost(_after(start, removals[:count]))

    count = bisect_left(range(len(removals) + 1), True, key=lambda n: cost_after(n) <= limit)
    if count > len(removals):
        most = 1 - cost_after(len(removals)) / cost(full)
        raise ValueError(
            f"sparsity {sparsity:.4g} cannot be reached: with whole blocks and the floor of each layer "
            f"the most is {most:.4g}; lower round_to, min_density or the sparsity"
        )
    widths = _after(start, removals[:count])
    kept = {}
    for name, score in scores.items():
        kept[name] = torch.zeros(len(score), dtype=torch.bool)
        kept[name][order[name][: widths[name]]] = True
    return kept


def _steps(name: str, ranked: Tensor, width: int, step: int, floor: int) -> list[Step]:
    """The blocks that may go, the worst first; their mean scores never fall."""
    found: list[Step] = []
    current = width
    while True:
        smaller = (current - 1) // step * step
        if smaller < max(floor, step):
            return found
        mean = float(ranked[smaller:current].mean())
        if found:  # equal scores: their mean may fall by rounding
            mean = max(mean, found[-1].score)
        found.append(Step(mean, name, smaller))
        current = smaller


def _floor(num_channels: int, step: int, min_density: float) -> int:
    least = round(max(1, min_density * num_channels), 9)  # 0.07 * 100 is more than 7
    return math.ceil(least / step) * step


def _after(start: Mapping[str, int], removals: list[Step]) -> dict[str, int]:
    return {**start, **{step.group: step.width for step in removals}}


def _number(widths: Mapping[str, int]) -> float:
    return float(sum(widths.values()))
