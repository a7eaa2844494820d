"""Checks that options are of the types that their annotations say, wherever they come from."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "None"}


def check_options(options: object, **least: float) -> None:
    """Raise a `ValueError` if a field of a dataclass is not of its type, not finite or below its least."""
    owner = type(options).__name__
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        check_type(f"{owner}: {name}", value, hint)
        if name in least and value < least[name]:
            raise ValueError(f"{owner}: {name} must be at least {least[name]:g}, got {value}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` unless `value` is what `hint` says; only builtin types are looked at.

    YAML and command lines give strings and booleans where numbers are meant. Booleans are no numbers here.
    """
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not any(_fits(value, each) for each in hints):
        raise ValueError(f"{name} must be {' or '.join(map(_described, hints))}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _KINDS or hint is str else True


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    return _KINDS.get(hint, "a string")
