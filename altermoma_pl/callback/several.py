"""Several callbacks of ours in one Trainer: names, and weights that they must not share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback

_NAME = re.compile(r"[\w-]+")


def callbacks_of(trainer: Any) -> list[Callback]:
    """All callbacks of a Trainer: it gets the attribute from elsewhere, so that its type is not known."""
    return list(trainer.callbacks)


def check_name(name: str | None) -> None:
    """Raise a `ValueError` unless the name can be a part of metrics, files and keys, or is None."""
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"name must be None, or made of letters, digits, '_' and '-', got {name!r}")


def check_disjoint(
    own: Iterable[str], other: Iterable[str], name: str | None, other_name: str | None
) -> None:
    """Raise a `ValueError` if two callbacks prune the same weights."""
    common = [parameter for parameter in own if parameter in set(other)]
    if common:
        raise ValueError(
            f"the callbacks {other_name!r} and {name!r} both prune {common}: their masks would contradict "
            f"each other; give them disjoint `prunable` patterns, for example "
            f"prunable=['!{common[0]}'] to one of them"
        )
