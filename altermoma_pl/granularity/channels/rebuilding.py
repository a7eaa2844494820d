"""Slim models in checkpoints: what is saved, and a dense model brought to its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.resizing import (
    Attributes,
    Resizing,
    memory_format_of,
    named_tensors,
    replace_tensors_,
)

SLIM_FORMAT = 1
KEY = "slim"
"""The entry of a checkpoint that says how its model differs from the dense one."""


def slim_entry(
    attributes: Attributes,
    widths: Mapping[str, tuple[int, int]],
    modalities: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a checkpoint of a slim model holds beside its weights, of builtins only: see `Slim`.

    The modality of each group, or "shared", is told as far as it is known.
    """
    return {
        "format": SLIM_FORMAT,
        "attributes": {path: dict(values) for path, values in attributes.items()},
        "widths": {name: list(width) for name, width in widths.items()},
        "modalities": dict(modalities or {}),
    }


@torch.no_grad()
def reshape_like_(model: nn.Module, state: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Give a dense model the shapes and attributes of a slim one, in place; its weights are not set.

    Args:
        model: Built as the dense model was.
        state: The slim model's state_dict.
        entry: Of `slim_entry`.

    Raises:
        ValueError: If the entry is none, or the model is another one.
    """
    known = isinstance(entry, Mapping) and entry.get("format") == SLIM_FORMAT and "attributes" in entry
    if not known:
        raise ValueError(
            f"the checkpoint is not that of a slim model: it needs an entry {KEY!r} of format {SLIM_FORMAT}, "
            f"as `altermoma export` writes it, got {entry!r:.80}"
        )
    modules, tensors = dict(model.named_modules()), dict(named_tensors(model))
    pairs = {name: (like, tensors[name]) for name, like in state.items() if name in tensors}  # no extra state
    strange = sorted(state.keys() ^ model.state_dict().keys())
    strange += [path for path in entry["attributes"] if path not in modules]
    strange += [name for name, (like, old) in pairs.items() if not _is_part(like, old)]
    if strange:
        raise ValueError(
            f"the slim checkpoint is of another model than {type(model).__name__}: they differ in "
            f"{strange[:5]}; build the model as it was before it was slimmed"
        )
    smaller = {
        name: torch.empty_like(like, dtype=old.dtype, device=old.device, memory_format=memory_format_of(old))
        for name, (like, old) in pairs.items()
        if like.shape != old.shape
    }
    replace_tensors_(model, smaller)
    for path, values in entry["attributes"].items():
        for attribute, value in values.items():
            setattr(modules[path], attribute, value)


def _is_part(slim: Tensor, dense: Tensor) -> bool:
    """Whether a tensor can be a part of the other."""
    return slim.ndim == dense.ndim and all(a <= b for a, b in zip(slim.shape, dense.shape, strict=True))


def slim_optimizer_states(
    states: list[dict[str, Any]], parameters: Mapping[str, nn.Parameter], resizing: Resizing
) -> list[dict[str, Any]]:
    """States of optimizers without what belongs to removed channels.

    Args:
        states: As optimizers save them, of the dense shapes.
        parameters: Name -> trainable parameter of the dense model, in its order.
        resizing: What stayed.

    Raises:
        ValueError: If it cannot be told whose a state is: parameters must have been given to the
            optimizers in the model's order, each to one.
    """
    # Optimizers save numbers, not names; in the order of their parameter groups these count the parameters.
    numbers = [
        (index, number)
        for index, each in enumerate(states)
        for group in each["param_groups"]
        for number in group["params"]
    ]
    if len(numbers) != len(parameters):
        raise ValueError(
            f"the optimizers hold {len(numbers)} parameters and the model {len(parameters)} that are trained"
        )
    names = dict(zip(numbers, parameters, strict=True))

    def resized(key: str, value: Any, name: str) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:  # as the count of steps
            return value
        if value.shape != parameters[name].shape:
            raise ValueError(f"the state {key!r} of {name!r} has another shape than the parameter")
        return resizing.resized(name, value)

    return [
        each
        | {
            "state": {
                number: {key: resized(key, value, names[index, number]) for key, value in values.items()}
                for number, values in each["state"].items()
            }
        }
        for index, each in enumerate(states)
    ]
