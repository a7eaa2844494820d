"""DeCI and ReRI kept apart, so that they can be stored and combined anew without scoring again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from altermoma_pl.masks import Masks

Normalization = Literal["mean", "sum", "none"]

_KEYS = {"deci", "reri", "group_of", "losses"}


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
    """

    deci: dict[str, Tensor]
    reri: dict[str, dict[str, Tensor]]
    group_of: dict[str, str]
    losses: dict[str, float]

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and builtins only."""
        return {
            "deci": {name: t.cpu() for name, t in self.deci.items()},
            "reri": {m: {name: t.cpu() for name, t in own.items()} for m, own in self.reri.items()},
            "group_of": dict(self.group_of),
            "losses": dict(self.losses),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Components:
        """Rebuild from `state_dict()`.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        if state.keys() != _KEYS:
            raise ValueError(f"state of components must hold {sorted(_KEYS)}, got {sorted(state)}")
        return cls(**state)


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
