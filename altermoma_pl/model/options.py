"""Checks that options are of the types that their annotations say, wherever they come from."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "None"}


def check_types(options: object, prefix: str = "") -> None:
    """Raise a `ValueError` if a field of a dataclass is not of its type, or a number is not finite.

    YAML and command lines give strings and booleans where numbers are meant. Booleans are no numbers here.
    """
    for name, hint in get_type_hints(type(options)).items():
        check_type(prefix + name, getattr(options, name), hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` unless `value` is what `hint` says; only builtin types are looked at."""
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_options(options: object, **least: float) -> None:
    """Raise a `ValueError` if a field is not of its type, is not finite, or is out of range.

    Args:
        options: A dataclass.
        **least: Field -> its least value.
    """
    check_types(options)
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise ValueError(f"{name} must be at least {bound:g}, got {getattr(options, name)}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _KINDS or hint is str else True


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {list(get_args(hint))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_described(each) for each in get_args(hint))
    return _KINDS.get(hint, "a string")
