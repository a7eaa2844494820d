"""What a saved pruning state must be, beyond the types of its masks, components and rewind point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from altermoma_pl.mask.masks import Masks
from altermoma_pl.score import Components


def check_epoch(what: str, value: Any, least: int = 0) -> None:
    """Raise a `ValueError` unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")


def check_groups(group_of: Any, masks: Masks | None) -> None:
    """Raise a `ValueError` unless every mask has a group, and nothing else has."""
    if not isinstance(group_of, Mapping) or not all(isinstance(group, str) for group in group_of.values()):
        raise ValueError(f"group_of must map parameter names to groups, got {group_of!r:.80}")
    if set(masks or {}) != set(group_of):
        raise ValueError(f"masks and groups differ in {sorted(map(str, set(masks or {}) ^ set(group_of)))}")


def check_events(events: Any, masks: Masks | None) -> None:
    """Raise a `ValueError` unless events are as `PruningState.record` makes them, the last as the masks."""
    if not isinstance(events, list):
        raise ValueError(f"events must be a list, got {events!r:.80}")
    for index, event in enumerate(events):
        _check_event(f"event {index}", event)
    recorded = events[-1]["sparsity"] if events else 0.0
    found = masks.sparsity if masks is not None else 0.0
    if abs(recorded - found) > 1e-6:
        raise ValueError(f"the masks prune a share of {found:g}, the latest event recorded {recorded:g}")


def check_components(components: Components, masks: Masks | None, group_of: Mapping[str, str]) -> None:
    """Raise a `ValueError` unless components are those of the masked parameters, in their shapes."""
    if components.group_of != dict(group_of):
        raise ValueError(
            f"components and masks differ in the groups of {_difference(components.group_of, group_of)}"
        )
    shapes = {name: mask.shape for name, mask in (masks or {}).items()}
    for what, tensors in {
        "deci": components.deci,
        "magnitude": components.magnitude,
        **components.reri,
    }.items():
        # Redundancy is of the parameters outside the modality that was deactivated.
        expected = {n: s for n, s in shapes.items() if what not in components.reri or group_of[n] != what}
        if what in components.reri and components.level == "tensor":
            expected = dict.fromkeys(expected, torch.Size())
        found = {n: t.shape for n, t in tensors.items()}
        if found != expected:
            raise ValueError(f"components and masks differ: {what!r} at {_difference(found, expected)}")


def misfit_of_optimizer(saved: dict[str, Any], live: Optimizer) -> str | None:
    """The path to what an optimizer would not load, None if all fits."""
    path, now = "optimizer", live.state_dict()
    if saved.keys() != now.keys() or not isinstance(saved["state"], dict):
        return path
    parameters = [p for group in live.param_groups for p in group["params"]]
    numbers = [number for group in now["param_groups"] for number in group["params"]]
    shapes = {number: p.shape for number, p in zip(numbers, parameters, strict=True)}
    for number, entry in saved["state"].items():
        here = f"{path}.state.{number}"
        if number not in shapes or not isinstance(entry, dict):
            return here
        problem = misfit(entry, now["state"].get(number), here)
        wrong = [n for n, t in entry.items() if isinstance(t, Tensor) and t.shape not in ((), shapes[number])]
        if problem or wrong:
            return problem or f"{here}.{wrong[0]}"
    groups = f"{path}.param_groups"
    problem = misfit(saved["param_groups"], now["param_groups"], groups)
    if problem:
        return problem
    same = [g["params"] for g in saved["param_groups"]] == [g["params"] for g in now["param_groups"]]
    return None if same else groups


def misfit(saved: Any, live: Any, path: str) -> str | None:
    """The path to where the saved value is of another kind than the live one; None may become a number."""
    if live is None:
        known = isinstance(saved, (int, float)) and not math.isnan(saved)
        return None if saved is None or known else path
    if isinstance(live, dict):
        if not isinstance(saved, dict) or saved.keys() != live.keys():
            return path
        parts = [(f"{path}.{key}", saved[key], live[key]) for key in live]
    elif isinstance(live, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(live):
            return path
        parts = [(f"{path}.{index}", *each) for index, each in enumerate(zip(saved, live, strict=True))]
    elif isinstance(live, (int, float, Tensor)):
        fits = isinstance(saved, (int, float, Tensor)) and isinstance(saved, bool) == isinstance(live, bool)
        fits = fits and getattr(saved, "shape", ()) == getattr(live, "shape", ())
        return path if not fits or (isinstance(saved, float) and math.isnan(saved)) else None
    else:
        return None if type(saved) is type(live) else path
    return next(filter(None, (misfit(old, now, where) for where, old, now in parts)), None)


def _check_event(what: str, event: Any) -> None:
    if not isinstance(event, Mapping):
        raise ValueError(f"{what} must be a dictionary, got {event!r:.80}")
    missing = sorted({"epoch", "step", "sparsity", "kept", "losses"} - event.keys())
    if missing:
        raise ValueError(f"{what} lacks {missing}")
    check_epoch(f"epoch of {what}", event["epoch"])
    check_epoch(f"step of {what}", event["step"])
    check_epoch(f"num_skipped of {what}", event.get("num_skipped", 0))
    _check_share(f"sparsity of {what}", event["sparsity"])
    for name, share in _items(f"kept shares of {what}", event["kept"]):
        _check_share(f"kept share of {name!r} in {what}", share)
    for name, loss in _items(f"losses of {what}", event["losses"]):
        _check_number(f"loss {name!r} in {what}", loss)
    _check_channels(what, event)
    if "beta" in event:
        _check_number(f"beta of {what}", event["beta"])
    for name, loss in _items(f"beta_losses of {what}", event.get("beta_losses", {})):
        if loss is not None:
            _check_number(f"loss for beta {name} in {what}", loss)


def _check_channels(what: str, event: Mapping[str, Any]) -> None:
    for name, counts in _items(f"widths of {what}", event.get("widths", {})):
        _check_width(f"width of {name!r} in {what}", counts)
    for key in ("channels", "flops") if "widths" in event else ():
        _check_share(f"{key} of {what}", event.get(key))
    for name, group in _items(f"declared groups of {what}", event.get("declared", {})):
        sides = dict(_items(f"declared group {name!r} of {what}", group))
        if not all(isinstance(side, str) for side in sides.values()):
            raise ValueError(
                f"declared group {name!r} of {what} must map modules to sides, got {sides!r:.80}"
            )


def _items(what: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must be a dictionary by name, got {value!r:.80}")
    return list(value.items())


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{what} must be a number, got {value!r:.80}")


def _check_width(what: str, value: Any) -> None:
    whole = isinstance(value, list) and [type(count) for count in value] == [int, int]
    if not whole or not 1 <= value[0] <= value[1]:
        raise ValueError(f"{what} must be two whole numbers, kept and total, got {value!r:.80}")


def _check_share(what: str, value: Any) -> None:
    _check_number(what, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {value!r}")


def _difference(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[str]:
    return sorted(str(name) for name in one.keys() | other.keys() if one.get(name) != other.get(name))
