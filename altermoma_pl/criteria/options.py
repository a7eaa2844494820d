"""Checks that the options of criteria share."""

from __future__ import annotations

from altermoma_pl.options import check_types


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
