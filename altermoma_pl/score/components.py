"""DeCI and ReRI kept apart, so that they can be stored and combined anew without scoring again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_KEYS = {"deci", "reri", "group_of", "losses", "magnitude"}


@dataclass(frozen=True)
class Components:
    """What one scoring event measured.

    Args:
        deci: Parameter name -> D_i, the contribution with all modalities active (eq. 6).
        reri: Deactivated modality -> parameter name -> R_i, the redundancy that it reactivates in the
            parameters of all other groups (eq. 10, 26, 34, 35); or the mean over the tensor's live weights,
            a tensor without dimensions, where the criterion judges whole tensors.
        group_of: Parameter name -> its modality or "shared".
        losses: Mean loss over the probe batches: "all", and for each modality m
            "without_m" and "without_m_reactivated" (eq. 4 and 7).
        magnitude: Parameter name -> |theta_i|.
    """

    deci: dict[str, Tensor]
    reri: dict[str, dict[str, Tensor]]
    group_of: dict[str, str]
    losses: dict[str, float]
    magnitude: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and builtins only."""
        return {
            "deci": {name: t.cpu() for name, t in self.deci.items()},
            "reri": {m: {name: t.cpu() for name, t in own.items()} for m, own in self.reri.items()},
            "group_of": dict(self.group_of),
            "losses": dict(self.losses),
            "magnitude": {name: t.cpu() for name, t in self.magnitude.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Components:
        """Rebuild from `state_dict()`.

        Raises:
            ValueError: If a key is missing or unknown, or a value of another type than described.
        """
        if not isinstance(state, Mapping) or state.keys() != _KEYS:
            raise ValueError(f"state of components must hold {sorted(_KEYS)}, got {_named(state)}")
        if not isinstance(state["reri"], Mapping):
            raise ValueError(
                f"'reri' of components must map modalities to tensors by name, got {state['reri']!r}"
            )
        tensors = {"deci": state["deci"], "magnitude": state["magnitude"]}
        tensors |= {f"reri of {modality!r}": own for modality, own in state["reri"].items()}
        for what, value in tensors.items():
            _check_values(what, value, Tensor)
        _check_values("group_of", state["group_of"], str)
        _check_values("losses", state["losses"], (int, float))
        return cls(**state)


def _check_values(what: str, value: Any, kind: type | tuple[type, ...]) -> None:
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    if not named or not all(isinstance(each, kind) for each in value.values()):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{what!r} of components must map names to {kinds}, got {value!r:.80}")


def _named(state: Any) -> Any:
    return sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
