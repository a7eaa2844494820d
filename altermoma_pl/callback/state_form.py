"""The form of a saved pruning state; what has another is refused with a message that names the place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FORMAT = 2


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def check_form(value: Any, form: Any, place: str) -> None:
    """Raise a `ValueError` with the place of the first value that is not of the form.

    Args:
        value: Nested dictionaries and lists.
        form: A `Kind`; None for anything; a tuple of a form that may also be None; a list of the form of its
            items; or key -> form, where keys with `?` may be missing, `*` is any other, and there must be no
            other if no key is of these two sorts.
        place: How `value` is called.
    """
    if isinstance(form, tuple):
        form = None if value is None else form[0]
    if isinstance(form, Kind):
        check(form.holds(value), f"{place} must be {form.words}, got {value!r:.80}")
    elif isinstance(form, list):
        check(isinstance(value, list), f"{place} must be a list, got {value!r:.80}")
        for index, each in enumerate(value):
            check_form(each, form[0], f"{place}.{index}")
    elif form is not None:
        named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        check(named, f"{place} must be a dictionary by name, got {value!r:.80}")
        needed = {key for key in form if key[-1] not in "?*"}
        fits = needed <= value.keys() and (needed < form.keys() or value.keys() <= needed)
        check(fits, f"{place} must hold {sorted(needed)}, got {sorted(value)}")
        for key, each in value.items():
            check_form(each, form.get(key) or form.get(f"{key}?") or form.get("*"), f"{place}.{key}")


def check(holds: bool, message: str) -> None:
    """Raise a `ValueError` with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _is_width(value: Any) -> bool:
    whole = isinstance(value, list) and [type(count) for count in value] == [int, int]
    return whole and 1 <= value[0] <= value[1]


_COUNT = Kind("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_EPOCH = Kind("a whole number of at least -1", lambda value: type(value) is int and value >= -1)
_NUMBER = Kind("a number", _is_number)
_SHARE = Kind("in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_WIDTH = Kind("two whole numbers, kept and total", _is_width)
_TENSOR = Kind("a tensor", lambda value: isinstance(value, Tensor))
_TEXTS = {"*": Kind("text", lambda value: isinstance(value, str))}
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
}
_COMPONENTS = {
    "deci": _TENSORS,
    "reri": {"*": _TENSORS},
    "group_of": _TEXTS,
    "losses": {"*": _NUMBER},
    "magnitude": _TENSORS,
    "level?": None,
}
_POINT = {
    "epoch": _COUNT,
    "parameters": _TENSORS,
    "buffers": _TENSORS,
    "optimizers": [{"*": None}],
    "schedulers": [{"*": None}],
}
STATE = {
    "format": _COUNT,
    "masks": ({"*": {"shape": [_COUNT], "bits": _TENSOR}},),
    "group_of": _TEXTS,
    "last_event_epoch": _EPOCH,
    "events": [_EVENT],
    "components": (_COMPONENTS,),
    "rewind_point": (_POINT,),
}
