"""Components, which can be stored and combined anew without scoring again, and how they go together.

Tensors by parameter name; neither models nor batches are known here. Sums, means and ranks run over live
weights: those that are pruned already have the value 0, as the weight has. At the level "tensor" one value
stands for a whole tensor: the mean over its live weights, a tensor without dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import Computed
from altermoma_pl.model.distributed import total

Level = Literal["weight", "tensor"]
Normalization = Literal["mean", "sum", "none"]
ByName = Mapping[str, Tensor]
Live = Mapping[str, int]  # parameter name -> number of its weights that are not pruned

_SMALLEST_RATIO = 1e-6  # a negative exponent must not make scores infinite


@dataclass(frozen=True)
class Components:
    """What one scoring event measured.

    Args:
        deci: Parameter name -> D_i, the contribution with all modalities active (eq. 6).
        reri: Deactivated modality -> parameter name -> R_i, the redundancy that it reactivates in the
            parameters of all other groups (eq. 10, 26, 34, 35).
        group_of: Parameter name -> its modality or "shared".
        losses: Mean loss over the probe batches: "all", and for each modality m
            "without_m" and "without_m_reactivated" (eq. 4 and 7).
        magnitude: Parameter name -> |theta_i|.
        level: Whether ReRI is that of each "weight" or of the whole "tensor": then it is the mean over the
            live weights, a tensor without dimensions.
    """

    deci: dict[str, Tensor]
    reri: dict[str, dict[str, Tensor]]
    group_of: dict[str, str]
    losses: dict[str, float]
    magnitude: dict[str, Tensor]
    level: Level = "weight"

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and builtins only."""
        return tree_map_only(Tensor, Tensor.cpu, dict(vars(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Components:
        """Rebuild from `state_dict()`, taken as it is."""
        # Of November 2026 and before: the shape alone told the level.
        whole = all(r.ndim == 0 for own in state["reri"].values() for r in own.values())
        return cls(**{"level": "tensor" if whole else "weight", **state})


def live_counts(values: ByName, masks: Masks | None) -> dict[str, int]:
    """Parameter name -> number of its weights that are not pruned; of values of the parameter's shape."""
    return {n: value.numel() if masks is None else masks.counts[n] for n, value in values.items()}


def leading(components: Components, magnitude_share: float) -> ByName:
    """DeCI^(1 - s) * |theta|^s: the contribution for s = 0, and |theta| sqrt(mean |g|) for s = 1/2."""
    share, deci, magnitude = magnitude_share, components.deci, components.magnitude
    if share == 0:
        return deci
    return Computed(deci, lambda name: (deci[name] ** (1 - share)).mul_(magnitude[name] ** share))


def redundancy(components: Components, normalization: Normalization, level: Level, live: Live) -> ByName:
    """The mean over deactivations of R_i, normalised within the group."""
    if level == "weight" and components.level == "tensor":
        raise ValueError(
            "these components hold the redundancy of whole tensors, and redundancy_level='weight' needs "
            "that of each weight: measure them with this criterion"
        )
    group_of = components.group_of
    parts: dict[str, list[Tensor]] = {name: [] for name in components.deci}
    for modality, reri in components.reri.items():
        # The sums are looked at whatever the normalization is: "none" would hide that they are 0.
        for group, amount in group_sums(reri, group_of, live, components.level).items():
            if amount == 0:
                warnings.warn(
                    f"ReRI of the group {group!r} with {modality!r} deactivated is 0: "
                    f"nothing is redundant there, or nothing was reactivated",
                    stacklevel=3,
                )
        divisors = group_divisors(reri, group_of, normalization, live, components.level)
        for name, r in reri.items():
            parts[name].append(r / divisors[group_of[name]])
    # A backbone has M - 1 parts, what is shared M: each is the mean of its own (eq. 11 and 13).
    means = {name: torch.stack(each).mean(0) for name, each in parts.items()}
    return means if level == components.level else tensor_means(means, live)


def discount(components: Components, alpha: float, beta: float, level: Level, live: Live) -> ByName:
    """The share min(1, alpha d / r)^beta, with d and r relative to the mean over the group."""
    divisors = group_divisors(components.deci, components.group_of, "mean", live)
    d = components.deci if level == "weight" else tensor_means(components.deci, live)
    r = redundancy(components, "mean", level, live)
    shares = {}
    for name in d:
        relative = d[name] / divisors[components.group_of[name]]
        # Where r is 0 nothing is redundant, also where d is 0.
        ratio = torch.where(r[name] > 0, alpha * relative / r[name], 1.0)
        shares[name] = ratio.clamp(_SMALLEST_RATIO, 1) ** beta
    return shares


def tensor_means(values: ByName, live: Live) -> dict[str, Tensor]:
    """The mean over the live weights of each tensor, in float64 and on the CPU."""
    # The sum runs over all weights, the mean over live ones: pruned ones add 0. A tensor may have none left.
    means = {name: total(value) / max(live[name], 1) for name, value in values.items()}
    return {name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()}


def check_contribution(components: Components, live: Live) -> None:
    """A group without any contribution is an error, unless earlier pruning has cut it off."""
    sums = group_sums(components.deci, components.group_of, live)
    for group in (group for group, amount in sums.items() if amount == 0):
        names = [name for name, own in components.group_of.items() if own == group]
        if all(live[name] == components.deci[name].numel() for name in names):
            raise ValueError(f"DeCI of the group {group!r} is 0: the loss depends on none of its weights")
        warnings.warn(
            f"DeCI of the group {group!r} is 0: earlier pruning has cut it off from the loss; a larger "
            f"min_density would have kept it",
            stacklevel=3,
        )


def group_divisors(
    values: ByName, group_of: Mapping[str, str], normalization: Normalization, live: Live,
    level: Level = "weight",
) -> dict[str, float]:  # fmt: skip
    """Group -> what its values are divided by; 1 for a group whose values are all 0."""
    if normalization == "none":  # without the sums: they would read every weight
        return dict.fromkeys((group_of[name] for name in values), 1.0)
    divisors = group_sums(values, group_of, live, level)
    if normalization == "mean":
        counts = {group: sum(live[n] for n in values if group_of[n] == group) for group in divisors}
        divisors = {group: amount / max(counts[group], 1) for group, amount in divisors.items()}
    return {group: divisor or 1.0 for group, divisor in divisors.items()}


def group_sums(
    values: ByName, group_of: Mapping[str, str], live: Live, level: Level = "weight"
) -> dict[str, float]:
    """Group -> the sum of its values over live weights, in float64."""
    sums: dict[str, float] = {}
    for name, value in values.items():
        # `total` sums in float64: groups have millions of weights, and float32 would lose the small ones.
        amount = float(value) * live[name] if level == "tensor" else total(value)
        sums[group_of[name]] = sums.get(group_of[name], 0.0) + amount
    return sums
