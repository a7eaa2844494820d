"""Copies of the weights that other callbacks hold: averages over steps (EMA) or over epochs (SWA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from altermoma_pl.callback.several import callbacks_of
from altermoma_pl.masks import Masks


@torch.no_grad()
def hold_everywhere_(
    trainer: Trainer, module: nn.Module, masks: Masks, saved: Mapping[str, Any] | None = None
) -> None:
    """Set the pruned weights to zero in the model, in each copy of it, and in a `state_dict` to be saved.

    The average of zeros is zero, so that copies stay right from one event to the next. Those that were
    made before an event know nothing of it, and some callbacks exchange them with the model's weights
    for validation, save them in its place, or leave them in it when training ends.
    """
    places: list[dict[str, Tensor]] = [dict(module.named_parameters())]
    places += [*copies(trainer, module, masks)]
    if saved is not None:
        places += _matching(_tensors(saved), masks)
    for tensors in places:
        for name, mask in masks.items():
            tensor = tensors[name]
            if isinstance(tensor, DTensor) == isinstance(mask, DTensor):
                tensor.masked_fill_(~mask.to(tensor.device), 0)


def copies(trainer: Trainer, module: nn.Module, masks: Masks) -> Iterator[dict[str, Tensor]]:
    """Masked parameter name -> tensor, for each copy of the module's weights in an attribute of a callback.

    A copy is a module, or a dictionary of tensors, that has all masked parameters with their shapes,
    under the same names: whole, below a wrapper (`module.`), or of the one submodule that has them all.
    """
    for callback in callbacks_of(trainer):
        for value in vars(callback).values():
            if value is not module:
                yield from _matching(_tensors(value), masks)


def _tensors(value: Any) -> dict[str, Tensor]:
    if isinstance(value, nn.Module):
        return dict(value.named_parameters())
    return {n: t for n, t in value.items() if isinstance(t, Tensor)} if isinstance(value, dict) else {}


def _matching(tensors: Mapping[str, Tensor], masks: Masks) -> Iterator[dict[str, Tensor]]:
    for short in _shortened(list(masks)):
        first = next(iter(short))
        wrappers = [n.removesuffix(first) for n in tensors if n == first or str(n).endswith(f".{first}")]
        for wrapper in wrappers:
            found = {name: tensors.get(wrapper + own) for own, name in short.items()}
            if all(t is not None and t.shape == masks[name].shape for name, t in found.items()):
                yield {name: t for name, t in found.items() if t is not None}


def _shortened(names: list[str]) -> Iterator[dict[str, str]]:
    """The names, and again without their first part as long as it is the same in all: short -> full."""
    short = {name: name for name in names}
    while True:
        yield short
        shorter = {own.partition(".")[2]: name for own, name in short.items()}
        # Never down to a bare `weight`, which any module has.
        if len({own.partition(".")[0] for own in short}) > 1 or not all("." in own for own in shorter):
            return
        short = shorter
