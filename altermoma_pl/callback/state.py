"""What the callback holds: the state of pruning, its form in a checkpoint, what enforces it during fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from altermoma_pl.callback.rewinding import RewindPoint
from altermoma_pl.enforce.enforcement import Enforcement, hold_everywhere_
from altermoma_pl.granularity import Ranking, Traced
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import Scope
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import Components
from altermoma_pl.score.combination import Level
from altermoma_pl.score.decision import Decision

_FORMAT = 2


@dataclass(frozen=True)
class _Kind:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _check_form(value: Any, form: Any, place: str) -> None:
    """Raise a `ValueError` with the place of the first value that is not of the form.

    Args:
        value: Nested dictionaries and lists.
        form: A `_Kind`; None for anything; a tuple of a form that may also be None; a list of the form of its
            items; or key -> form, where keys with `?` may be missing, and `*` is any other.
        place: How `value` is called.
    """
    if isinstance(form, tuple):
        form = None if value is None else form[0]
    if isinstance(form, _Kind):
        _check(form.holds(value), f"{place} must be {form.words}, got {value!r:.80}")
    elif isinstance(form, list):
        _check(isinstance(value, list), f"{place} must be a list, got {value!r:.80}")
        for index, each in enumerate(value):
            _check_form(each, form[0], f"{place}.{index}")
    elif form is not None:
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        _check(named, f"{place} must be a dictionary by name, got {value!r:.80}")
        needed = {key for key in form if key[-1] not in "?*"}
        known = value.keys() if "*" in form else {key.removesuffix("?") for key in form}
        fits = needed <= value.keys() <= known
        _check(fits, f"{place} must hold {sorted(needed)}, got {sorted(value)}")
        for key, each in value.items():
            _check_form(each, form.get(key) or form.get(f"{key}?") or form.get("*"), f"{place}.{key}")


def _check(holds: bool, message: str) -> None:
    """Raise a `ValueError` with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


_COUNT = _Kind("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_EPOCH = _Kind("a whole number of at least -1", lambda value: type(value) is int and value >= -1)
_NUMBER = _Kind("a number", _is_number)
_SHARE = _Kind("in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_WIDTH = _Kind(
    "two whole numbers, kept and total",
    lambda value: isinstance(value, list) and [*map(type, value)] == [int, int] and 1 <= value[0] <= value[1],
)
_TENSOR = _Kind("a tensor", lambda value: isinstance(value, Tensor))
_TEXTS = {"*": _Kind("text", lambda value: isinstance(value, str))}
_TENSORS = {"*": _TENSOR}
_EVENT = {
    "epoch": _COUNT,
    "step": _COUNT,
    "sparsity": _SHARE,
    "kept": {"*": _SHARE},
    "losses": {"*": _NUMBER},
    "num_skipped?": _COUNT,
    "beta?": _NUMBER,
    "beta_losses?": {"*": (_NUMBER,)},
    "widths?": {"*": _WIDTH},
    "channels?": _SHARE,
    "flops?": _SHARE,
    "declared?": {"*": _TEXTS},
    "*": None,
}
_COMPONENTS = {
    "deci": _TENSORS,
    "reri": {"*": _TENSORS},
    "group_of": _TEXTS,
    "losses": {"*": _NUMBER},
    "magnitude": _TENSORS,
    "level?": _Kind("'weight' or 'tensor'", lambda value: value in get_args(Level)),
}
_POINT = {
    "epoch": _COUNT,
    "parameters": _TENSORS,
    "buffers": _TENSORS,
    "optimizers": [{"*": None}],
    "schedulers": [{"*": None}],
}
_STATE = {
    "format": _COUNT,
    "masks": ({"*": {"shape": [_COUNT], "bits": _TENSOR}},),
    "group_of": _TEXTS,
    "last_event_epoch": _EPOCH,
    "events": [_EVENT],
    "components": (_COMPONENTS,),
    "rewind_point": (_POINT,),
}


@dataclass
class PruningState:
    """Masks, the position in the schedule, and what the latest event measured.

    Args:
        masks: What is pruned; None before fit.
        group_of: Masked parameter -> its modality or "shared".
        last_event_epoch: Epoch of the latest event, -1 before the first.
        events: One entry for each event, oldest first: "epoch", "step", "sparsity", "kept" (group ->
            share) and "losses"; with beta="auto" also the "beta" that was chosen and "beta_losses", the
            loss of each candidate by its name, None if not finite; "num_skipped", if any batch was left
            out because its loss or gradient was not finite. Where channels are pruned, "widths" (group
            of channels -> how many stay, of how many), the shares of all "channels" and "flops" that are
            gone, and the groups that were "declared".
        components: DeCI and ReRI of the latest event, where the criterion has them and they are stored.
        rewind_point: What the events that are left rewind to; None where the schedule rewinds nothing.
    """

    masks: Masks | None = None
    group_of: dict[str, str] = field(default_factory=dict)
    last_event_epoch: int = -1
    events: list[dict[str, Any]] = field(default_factory=list)
    components: Components | None = None
    rewind_point: RewindPoint | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins only: loads with `torch.load(..., weights_only=True)`."""
        return {
            "format": _FORMAT,
            "masks": self.masks.state_dict() if self.masks else None,
            "group_of": dict(self.group_of),
            "last_event_epoch": self.last_event_epoch,
            "events": [dict(event) for event in self.events],
            "components": self.components.state_dict() if self.components else None,
            "rewind_point": self.rewind_point.state_dict() if self.rewind_point else None,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PruningState:
        """Rebuild from `state_dict()`: the one place that reads it; a `ValueError` tells what is wrong."""
        found = state.get("format", _FORMAT) if isinstance(state, dict) else _FORMAT
        if type(found) is not int or found != _FORMAT:
            raise ValueError(
                f"the pruning state has format {found!r:.80}, this version reads {_FORMAT}: resume with the "
                f"version of altermoma_pl that saved it, or start a new fit from the weights alone"
            )
        try:
            _check_form(state, _STATE, "state")
            parts = {key: value for key, value in state.items() if key != "format"}
            for key, kind in (("masks", Masks), ("components", Components)):
                parts[key] = None if state[key] is None else kind.from_state_dict(state[key])
            point = state["rewind_point"]
            parts["rewind_point"] = None if point is None else RewindPoint(**point)
            parts |= {"group_of": dict(state["group_of"]), "events": [dict(e) for e in state["events"]]}
            restored = cls(**parts)
            restored._check_parts_agree()
        except ValueError as error:
            raise ValueError(
                f"the pruning state in the checkpoint is damaged: {error}; resume from another "
                f"checkpoint, or start a new fit from the weights alone"
            ) from error
        return restored

    def _check_parts_agree(self) -> None:
        masks, found = dict(self.masks or {}), self.masks.sparsity if self.masks else 0.0
        differ = sorted(masks.keys() ^ self.group_of.keys())
        _check(not differ, f"masks and groups differ in {differ}")
        recorded = self.events[-1]["sparsity"] if self.events else 0.0
        same = abs(recorded - found) <= 1e-6
        _check(same, f"masks prune a share of {found:g}, the latest of events recorded {recorded:g}")
        if self.components is None:
            return
        same = self.components.group_of == self.group_of
        _check(same, "components and masks differ in group_of")
        reri = self.components.reri
        parts = {"deci": self.components.deci, "magnitude": self.components.magnitude, **reri}
        for what, tensors in parts.items():
            # Redundancy is of the parameters outside the modality that was deactivated.
            names = {name for name in masks if what not in reri or self.group_of[name] != what}
            whole = what in reri and self.components.level == "tensor"
            wrong = names ^ tensors.keys() or {
                name for name in names if tensors[name].shape != (() if whole else masks[name].shape)
            }
            _check(not wrong, f"components and masks differ: {what!r} at {sorted(wrong)}")

    def record(
        self, decision: Decision, epoch: int, step: int, keep_components: bool, traced: Traced | None = None
    ) -> None:
        """Take up what an event decided."""
        self.masks = decision.masks
        self.last_event_epoch = epoch
        self.components = decision.components if keep_components else None
        report = SparsityReport.of(decision.masks, self.group_of)
        event = {
            "epoch": epoch,
            "step": step,
            "sparsity": report.sparsity,
            "kept": {name: total.kept for name, total in report.groups.items()},
            "losses": dict(decision.components.losses) if decision.components else {},
        }
        if decision.beta is not None:
            finite = {f"{b:g}": x if math.isfinite(x) else None for b, x in decision.beta_losses.items()}
            event |= {"beta": decision.beta, "beta_losses": finite}
        if decision.num_skipped:
            event["num_skipped"] = decision.num_skipped
        if traced is not None:
            kept = {name: int(flags.sum()) for name, flags in traced.channels.kept(decision.masks).items()}
            full = {name: group.num_channels for name, group in traced.channels.items()}
            event |= {
                "widths": {name: [kept[name], full[name]] for name in full},
                "channels": 1 - sum(kept.values()) / sum(full.values()),
                "flops": 1 - traced.flops(kept) / traced.flops.total,
                "declared": {name: dict(sides) for name, sides in traced.declared.items()},
            }
        self.events.append(event)

    def report(self) -> SparsityReport:
        """What is pruned where; a `ValueError` if there are no masks."""
        if self.masks is None:
            raise ValueError("there are no masks to report on: nothing was pruned yet")
        event = self.events[-1] if self.events else {}
        report = SparsityReport.of(self.masks, self.group_of, event.get("losses", {}))
        if not {"channels", "flops"} <= event.keys():
            return report
        shown = tuple(name for name, mask in self.masks.items() if mask.ndim > 1)
        return replace(report, shown=shown, removed={"channels": event["channels"], "FLOPs": event["flops"]})


@dataclass
class Held:
    """The state of pruning; during fit what enforces its masks, and what was found in the model."""

    state: PruningState = field(default_factory=PruningState)
    enforcement: Enforcement | None = None  # outside of fit
    traced: Traced | None = None  # until training starts, and where no channels are pruned
    input_dims: dict[str, int] = field(default_factory=dict)

    @property
    def enforces_state(self) -> bool:
        """Whether the masks that are enforced are those of the state."""
        return self.enforcement is not None and self.enforcement.masks is self.state.masks

    def ranking(self, state: PruningState, scope: Scope, min_density: float) -> Ranking:
        """What the scores of the next event are ranked within.

        Raises:
            ValueError: If there are no masks.
        """
        if state.masks is None:
            raise ValueError("there are no masks to rank within: nothing was found to prune yet")
        within, dims = self.traced, self.input_dims
        return Ranking(state.masks, state.group_of, scope, min_density, None, within, dims)

    def load(self, saved: dict[str, Any]) -> None:
        """Take up a saved state; nothing is changed if it is damaged."""
        state = PruningState.from_state_dict(saved)
        if self.enforcement is not None and state.masks is not None:  # during fit: by a tuner
            state.masks = state.masks.to(self.enforcement.model)
        self.state = state

    def take_up(self, state: PruningState, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go over to another state, and enforce its masks from now on."""
        assert state.masks is not None  # noqa: S101 (whoever calls has made them)
        self.release()
        self.state, self.enforcement = state, Enforcement(module, state.masks, optimizers)

    def hold_(
        self, callbacks: Iterable[object], module: nn.Module, saved: Mapping[str, Any] | None = None
    ) -> None:
        """Bring the weights, and copies of them, in line with the state's masks; only during fit."""
        if self.enforcement is None or self.state.masks is None:
            return
        if not self.enforces_state:
            self.enforcement.masks = self.state.masks
        hold_everywhere_(callbacks, module, self.state.masks, saved)

    def release(self) -> None:
        """Let go of the optimizers."""
        if self.enforcement is not None:
            self.enforcement.release()
        self.enforcement = None
