"""Slim models in checkpoints: what is saved, and a dense model brought to its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.resizing import Attributes, Resizing, memory_format_of, named_tensors

FORMAT = 1
KEY = "slim"
"""The entry of a checkpoint that says how its model differs from the dense one."""


def slim_entry(
    attributes: Attributes,
    widths: Mapping[str, tuple[int, int]],
    modalities: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a checkpoint of a slim model holds beside its weights, of builtins only.

    Args:
        attributes: Module path -> attributes that differ from the dense model's.
        widths: Group of channels -> (how many stay, of how many).
        modalities: Group of channels -> its modality or "shared", as far as known.
    """
    return {
        "format": FORMAT,
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
        entry: What `slim_entry` made.

    Raises:
        ValueError: If the entry is none, or the model is another one.
    """
    attributes = _checked(entry)
    tensors = dict(named_tensors(model))
    saved = model.state_dict().keys()
    strange = sorted(set(state) ^ set(saved)) + [path for path in attributes if not _has(model, path)]
    strange += [name for name in saved if name in state and _is_other(tensors.get(name), state[name])]
    if strange:
        raise ValueError(
            f"the slim checkpoint is of another model than {type(model).__name__}: they differ in "
            f"{strange[:5]}; build the model as it was before it was slimmed"
        )
    new: dict[int, Tensor] = {}
    for name, like in state.items():
        old = tensors.get(name)
        if old is None or old.shape == like.shape:
            continue
        owner, _, leaf = name.rpartition(".")
        smaller: Tensor = torch.empty(
            like.shape, dtype=old.dtype, device=old.device, memory_format=memory_format_of(old)
        )
        if isinstance(old, nn.Parameter):
            smaller = nn.Parameter(smaller, old.requires_grad)
        setattr(model.get_submodule(owner), leaf, new.setdefault(id(old), smaller))
    for path, values in attributes.items():
        for attribute, value in values.items():
            setattr(model.get_submodule(path), attribute, value)


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
    names = list(parameters)
    numbers = [
        (index, number)
        for index, each in enumerate(states)
        for group in each["param_groups"]
        for number in group["params"]
    ]
    owner = dict(zip(numbers, names, strict=False))
    if len(numbers) != len(names):
        raise ValueError(
            f"the optimizers hold {len(numbers)} parameters and the model {len(names)} that are trained"
        )
    slimmed = []
    for index, each in enumerate(states):
        entries = {}
        for number, values in each["state"].items():
            name = owner[index, number]
            shape = parameters[name].shape
            odd = [k for k, v in values.items() if isinstance(v, Tensor) and v.ndim and v.shape != shape]
            if odd:
                raise ValueError(f"the state {odd[0]!r} of {name!r} has another shape than the parameter")
            entries[number] = {
                k: resizing.resized(name, v) if isinstance(v, Tensor) and v.ndim else v
                for k, v in values.items()
            }
        slimmed.append({**each, "state": entries})
    return slimmed


def _checked(entry: Any) -> Attributes:
    known = isinstance(entry, Mapping) and entry.get("format") == FORMAT
    if not known or not isinstance(entry.get("attributes"), Mapping):
        raise ValueError(
            f"the checkpoint is not that of a slim model: it needs an entry {KEY!r} of format {FORMAT}, as "
            f"`altermoma export` writes it, got {entry!r:.80}"
        )
    return {path: dict(values) for path, values in entry["attributes"].items()}


def _has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def _is_other(dense: Tensor | None, slim: Tensor) -> bool:
    """Whether one cannot be a part of the other."""
    if dense is None:  # extra state
        return False
    return dense.ndim != slim.ndim or any(a < b for a, b in zip(dense.shape, slim.shape, strict=True))
