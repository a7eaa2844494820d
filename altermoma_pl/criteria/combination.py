"""From components to scores: how contribution and redundancy go together.

Tensors by parameter name; neither models nor batches are known here. Sums, means and ranks run over live
weights: those that are pruned already have the value 0, as the weight has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from altermoma_pl.criteria.components import Components
from altermoma_pl.masks import Masks

Normalization = Literal["mean", "sum", "none"]
Values = dict[str, Tensor]


def leading(components: Components, magnitude_share: float) -> Values:
    """DeCI^(1 - s) * |theta|^s: the contribution for s = 0, and |theta| sqrt(mean |g|) for s = 1/2."""
    if magnitude_share == 0:
        return components.deci
    return {
        name: deci ** (1 - magnitude_share) * components.magnitude[name] ** magnitude_share
        for name, deci in components.deci.items()
    }


def redundancy(components: Components, normalization: Normalization, masks: Masks | None) -> Values:
    """The mean over deactivations of R_i, normalised within the group."""
    parts: dict[str, list[Tensor]] = {name: [] for name in components.deci}
    for modality, reri in components.reri.items():
        divisors = group_divisors(reri, components.group_of, normalization, masks)
        for group, total in group_divisors(reri, components.group_of, "sum", masks).items():
            if total == 0:
                warnings.warn(
                    f"ReRI of the group {group!r} with {modality!r} deactivated is 0: "
                    f"nothing is redundant there, or nothing was reactivated",
                    stacklevel=3,
                )
        for name, r in reri.items():
            parts[name].append(r / (divisors[components.group_of[name]] or 1.0))
    return {name: torch.stack(each).mean(0) for name, each in parts.items()}


def divided_by_group(
    values: Mapping[str, Tensor],
    group_of: Mapping[str, str],
    normalization: Normalization,
    masks: Masks | None,
) -> Values:
    """Each value divided by the mean or sum of its group, unless that is 0."""
    divisors = group_divisors(values, group_of, normalization, masks)
    return {name: value / (divisors[group_of[name]] or 1.0) for name, value in values.items()}


def tensor_means(values: Mapping[str, Tensor], masks: Masks | None) -> Values:
    """Each value replaced by the mean over the live weights of its tensor."""
    means = {}
    for name, value in values.items():
        live = value.numel() if masks is None else int(masks[name].count_nonzero())
        means[name] = (value.sum(dtype=torch.float64) / max(live, 1)).to(value.dtype).expand_as(value)
    return means


def check_contribution(components: Components, masks: Masks | None) -> None:
    """A group without any contribution is an error, unless earlier pruning has cut it off."""
    total = group_divisors(components.deci, components.group_of, "sum", masks)
    for group, amount in total.items():
        if amount != 0:
            continue
        names = [name for name, own in components.group_of.items() if own == group]
        if masks is None or all(bool(masks[name].all()) for name in names):
            raise ValueError(f"DeCI of the group {group!r} is 0: the loss depends on none of its weights")
        warnings.warn(
            f"DeCI of the group {group!r} is 0: earlier pruning has cut it off from the loss; a larger "
            f"min_density would have kept it",
            stacklevel=3,
        )


def group_divisors(
    values: Mapping[str, Tensor],
    group_of: Mapping[str, str],
    normalization: Normalization,
    masks: Masks | None,
) -> dict[str, float]:
    """Group -> what its values are divided by, summed in float64; pruned weights have the value 0."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, value in values.items():
        group = group_of[name]
        live = value.numel() if masks is None else int(masks[name].count_nonzero())
        sums[group] = sums.get(group, 0.0) + float(value.sum(dtype=torch.float64))
        counts[group] = counts.get(group, 0) + live
    if normalization == "none":
        return dict.fromkeys(sums, 1.0)
    if normalization == "sum":
        return sums
    return {group: total / max(counts[group], 1) for group, total in sums.items()}
