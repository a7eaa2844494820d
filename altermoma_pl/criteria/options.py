"""Checks that the options of criteria share."""

from __future__ import annotations

import math
from typing import Literal, get_args, get_origin, get_type_hints


def check_options(options: object, **least: float) -> None:
    """Raise a `ValueError` if a `Literal` field is none of its choices, or a number out of range.

    Args:
        options: A dataclass.
        **least: Field -> its least value, which may be minus infinity; what is named must be finite.
    """
    for name, hint in get_type_hints(type(options)).items():
        allowed = get_args(hint)
        if get_origin(hint) is Literal and getattr(options, name) not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(options, name)!r}")
    for name in least:
        if not math.isfinite(getattr(options, name)):
            raise ValueError(f"{name} must be finite, got {getattr(options, name)}")
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise ValueError(f"{name} must be at least {bound:g}, got {getattr(options, name)}")
