"""Keeps pruned weights at zero while optimizers run, in the model and in copies of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altermoma_pl.mask.masks import Masks, keep_only_
from altermoma_pl.model.distributed import local


class Enforcement:
    """Sets pruned weights to zero after every step of every optimizer that may move them.

    The step post hook is the one place that is reached after each real step, in automatic and manual
    optimization, with accumulation, and not after a step that a gradient scaler skips.
    """

    def __init__(self, model: nn.Module, masks: Masks, optimizers: Sequence[Optimizer]) -> None:
        self.model = model
        self._parameters = dict(model.named_parameters())
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self.follow(optimizers)
        self.masks = masks

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Take up the optimizers that move the weights now, where they were replaced during training."""
        if [*map(id, optimizers)] != [*map(id, self._optimizers)]:
            self.release()
            self._optimizers = list(optimizers)
            self._handles = [o.register_step_post_hook(lambda *_: self.hold_()) for o in self._optimizers]

    @property
    def masks(self) -> Masks:
        """What is held at zero; setting it zeroes the weights and the optimizers' moments at once."""
        return self._masks

    @masks.setter
    @torch.no_grad()
    def masks(self, masks: Masks) -> None:
        self._masks = masks
        # Tensors that nothing was pruned of need no work, step after step.
        self._pairs = [
            (self._parameters[name], mask) for name, mask in masks.items() if not local(mask).all()
        ]
        self.hold_()
        for optimizer in self._optimizers:
            for parameter, mask in self._pairs:
                # Not optimizer.state[...]: that would create an entry for a parameter that has none.
                for moment in optimizer.state.get(parameter, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                        keep_only_(moment, mask)

    @torch.no_grad()
    def hold_(self) -> None:
        """Set the pruned weights to zero."""
        for parameter, mask in self._pairs:
            keep_only_(parameter, mask)

    @torch.no_grad()
    def hold_gradients_(self) -> None:
        """Set the gradients of pruned weights to zero: see `reads_gradients`."""
        for parameter, mask in self._pairs:
            if parameter.grad is not None:
                keep_only_(parameter.grad, mask)

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


# Copies of the weights that other callbacks hold: averages over steps (EMA) or over epochs (SWA).


@torch.no_grad()
def hold_everywhere_(
    callbacks: Iterable[object], module: nn.Module, masks: Masks, saved: Mapping[str, Any] | None = None
) -> None:
    """Set the pruned weights to zero in the model, in each copy of it, and in a `state_dict` to be saved.

    The average of zeros is zero, so that copies stay right from one event to the next. Those that were
    made before an event know nothing of it, and some callbacks exchange them with the model's weights
    for validation, save them in its place, or leave them in it when training ends.
    """
    places: list[dict[str, Tensor]] = [dict(module.named_parameters()), *copies(callbacks, module, masks)]
    if saved is not None and masks.keys() <= saved.keys():
        places.append({name: saved[name] for name in masks})
    for tensors in places:
        for name, mask in masks.items():
            tensor = tensors[name]
            if isinstance(tensor, DTensor) == isinstance(mask, DTensor):
                keep_only_(tensor, mask.to(tensor.device))


def copies(callbacks: Iterable[object], module: nn.Module, masks: Masks) -> Iterator[dict[str, Tensor]]:
    """Masked parameter name -> tensor, for each copy of the module's weights in an attribute of a callback.

    A copy is a module, or a dictionary of tensors, that has all masked parameters with their shapes,
    under the same names: whole, below a wrapper (`module.`), or of the one submodule that has them all.
    """
    for callback in callbacks:
        for value in vars(callback).values():
            if isinstance(value, nn.Module) and value is not module:
                yield from _matching(dict(value.named_parameters()), masks)
            elif isinstance(value, dict):
                yield from _matching({str(n): t for n, t in value.items() if isinstance(t, Tensor)}, masks)


def _matching(tensors: Mapping[str, Tensor], masks: Masks) -> Iterator[dict[str, Tensor]]:
    for short in _shortened(list(masks)):
        found = []
        for wrapper in _wrappers(next(iter(short)), tensors):
            copy = {name: tensors[wrapper + own] for own, name in short.items() if wrapper + own in tensors}
            if len(copy) == len(masks) and all(t.shape == masks[name].shape for name, t in copy.items()):
                found.append(copy)
        if found:  # shorter names would find it again, and a second net of the same shapes beside it
            yield from found
            return


def _wrappers(name: str, tensors: Iterable[str]) -> list[str]:
    """What stands before the name where it occurs least deep: below may be another net, say a teacher."""
    before = [each.removesuffix(name) for each in tensors if f".{each}".endswith(f".{name}")]
    least = min((wrapper.count(".") for wrapper in before), default=0)
    return [wrapper for wrapper in before if wrapper.count(".") == least]


def _shortened(names: list[str]) -> Iterator[dict[str, str]]:
    """The names, and again without their first part as long as it is the same in all: short -> full."""
    # Two parts are left at least: any module has a bare `weight`.
    shared = os.path.commonprefix([name.split(".")[:-2] for name in names])  # noqa: RUF071 (of lists)
    for start in range(len(shared) + 1):
        yield {".".join(name.split(".")[start:]): name for name in names}
