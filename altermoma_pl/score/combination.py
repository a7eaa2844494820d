"""From components to scores: how contribution and redundancy go together.

Tensors by parameter name; neither models nor batches are known here. Sums, means and ranks run over live
weights: those that are pruned already have the value 0, as the weight has. A value may stand for a whole
tensor: it is then the mean over its live weights, a tensor without dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from altermoma_pl.mask.computed import Computed
from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.distributed import total
from altermoma_pl.score.components import Components

Level = Literal["weight", "tensor"]
Normalization = Literal["mean", "sum", "none"]
Values = Mapping[str, Tensor]

_SMALLEST_RATIO = 1e-6  # a negative exponent must not make scores infinite


def live_counts(values: Values, masks: Masks | None) -> dict[str, int]:
    """Parameter name -> number of its weights that are not pruned; of values of the parameter's shape."""
    return {n: value.numel() if masks is None else masks.counts[n] for n, value in values.items()}


def leading(components: Components, magnitude_share: float) -> Values:
    """DeCI^(1 - s) * |theta|^s: the contribution for s = 0, and |theta| sqrt(mean |g|) for s = 1/2."""
    if magnitude_share == 0:
        return components.deci

    def compute(name: str) -> Tensor:
        contribution = components.deci[name] ** (1 - magnitude_share)
        return contribution.mul_(components.magnitude[name] ** magnitude_share)

    return Computed(components.deci, compute)


def redundancy(
    components: Components, normalization: Normalization, live: Mapping[str, int]
) -> dict[str, Tensor]:
    """The mean over deactivations of R_i, normalised within the group."""
    parts: dict[str, list[Tensor]] = {name: [] for name in components.deci}
    for modality, reri in components.reri.items():
        divisors = group_divisors(reri, components.group_of, normalization, live)
        for group, amount in group_divisors(reri, components.group_of, "sum", live).items():
            if amount == 0:
                warnings.warn(
                    f"ReRI of the group {group!r} with {modality!r} deactivated is 0: "
                    f"nothing is redundant there, or nothing was reactivated",
                    stacklevel=3,
                )
        for name, r in reri.items():
            parts[name].append(r / (divisors[components.group_of[name]] or 1.0))
    return {name: torch.stack(each).mean(0) for name, each in parts.items()}


def discount(
    components: Components, alpha: float, beta: float, level: Level, live: Mapping[str, int]
) -> dict[str, Tensor]:
    """The share min(1, alpha d / r)^beta, with d and r relative to the mean over the group."""
    divisors = group_divisors(components.deci, components.group_of, "mean", live)
    d = at_level(components.deci, level, live)
    r = at_level(redundancy(components, "mean", live), level, live)
    shares = {}
    for name in d:
        relative = d[name] / (divisors[components.group_of[name]] or 1.0)
        # Where r is 0 nothing is redundant, also where d is 0.
        ratio = torch.where(r[name] > 0, alpha * relative / r[name], 1.0)
        shares[name] = ratio.clamp(_SMALLEST_RATIO, 1) ** beta
    return shares


def at_level(values: Values, level: Level, live: Mapping[str, int]) -> Values:
    """The values themselves, or the means over tensors.

    Raises:
        ValueError: If those of weights are asked for, and values stand for whole tensors.
    """
    if level == "tensor":
        return tensor_means(values, live)
    if any(value.ndim == 0 for value in values.values()):
        raise ValueError(
            "these components hold the redundancy of whole tensors, and redundancy_level='weight' needs "
            "that of each weight: measure them with this criterion"
        )
    return values


def plain(value: Tensor) -> Tensor | float:
    """A number where the value stands for a whole tensor: that is on the CPU and not sharded."""
    return value.item() if value.ndim == 0 else value


def tensor_means(values: Values, live: Mapping[str, int]) -> dict[str, Tensor]:
    """The mean over the live weights of each tensor, in float64 and on the CPU."""
    means = {}
    for name, value in values.items():
        mean = float(value) if value.ndim == 0 else total(value) / max(live[name], 1)
        means[name] = torch.tensor(mean, dtype=torch.float64)
    return means


def check_contribution(components: Components, masks: Masks | None) -> None:
    """A group without any contribution is an error, unless earlier pruning has cut it off."""
    live = live_counts(components.deci, masks)
    amounts = group_divisors(components.deci, components.group_of, "sum", live)
    for group, amount in amounts.items():
        if amount != 0:
            continue
        names = [name for name, own in components.group_of.items() if own == group]
        if all(live[name] == components.deci[name].numel() for name in names):
            raise ValueError(f"DeCI of the group {group!r} is 0: the loss depends on none of its weights")
        warnings.warn(
            f"DeCI of the group {group!r} is 0: earlier pruning has cut it off from the loss; a larger "
            f"min_density would have kept it",
            stacklevel=3,
        )


def group_divisors(
    values: Values, group_of: Mapping[str, str], normalization: Normalization, live: Mapping[str, int]
) -> dict[str, float]:
    """Group -> what its values are divided by, summed in float64; pruned weights have the value 0."""
    if normalization == "none":
        return {group_of[name]: 1.0 for name in values}
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, value in values.items():
        group = group_of[name]
        amount = float(value) * live[name] if value.ndim == 0 else total(value)
        sums[group] = sums.get(group, 0.0) + amount
        counts[group] = counts.get(group, 0) + live[name]
    if normalization == "sum":
        return sums
    return {group: amount / max(counts[group], 1) for group, amount in sums.items()}
