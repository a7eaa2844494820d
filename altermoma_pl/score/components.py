"""DeCI and ReRI kept apart, so that they can be stored and combined anew without scoring again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_map_only

Level = Literal["weight", "tensor"]


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
