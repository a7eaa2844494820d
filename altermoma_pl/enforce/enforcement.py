"""Keeps pruned weights at zero while optimizers run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altermoma_pl.mask.masks import Masks, keep_only_
from altermoma_pl.model.distributed import local


class Enforcement:
    """Sets pruned weights to zero after every step of every optimizer.

    The step post hook is the one place that is reached after each real step, in automatic and manual
    optimization, with accumulation, and not after a step that a gradient scaler skips.

    Args:
        model: The model whose parameters the masks name.
        masks: What to hold at zero.
        optimizers: The optimizers that may move the weights.
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
    def masks(self, masks: Masks) -> None:
        self._masks = masks
        # Tensors that nothing was pruned of need no work, step after step.
        self._pairs = [
            (self._parameters[name], mask) for name, mask in masks.items() if not local(mask).all()
        ]
        self.hold_()
        self._zero_moments_()

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

    @torch.no_grad()
    def _zero_moments_(self) -> None:
        """Momentum and Adam moments would carry a pruned weight away from zero."""
        for optimizer in self._optimizers:
            for parameter, mask in self._pairs:
                # Not optimizer.state[...]: that would create an entry for a parameter that has none.
                for moment in optimizer.state.get(parameter, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                        keep_only_(moment, mask)
