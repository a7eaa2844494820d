"""Whether anything reads the gradients of several weights together."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import optim

from altermoma_pl.callback.checks import callbacks_of

_BY_ELEMENT = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.Adagrad,
    optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip
_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_NOT_OWN = ("lightning", "pytorch_lightning", "altermoma_pl")
_MODULE_HOOKS = (*_HOOKS, "configure_gradient_clipping", "optimizer_step")


def reads_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients of pruned weights must be set to zero after each backward pass.

    A pruned weight is set to zero after the step, whatever its gradient was. The gradient matters only
    to what takes many together: clipping by norm, a hook that measures them, an optimizer that does more
    than each weight for itself (a trust ratio, factored moments). Only where there is none of these a
    pass over all gradients is saved.
    """
    return (
        not module.automatic_optimization  # the user's code may do anything between backward and step
        or bool(trainer.gradient_clip_val)
        or any(_is_own(module, hook) for hook in _MODULE_HOOKS)
        or any(_is_own(callback, hook) for callback in callbacks_of(trainer) for hook in _HOOKS)
        or any(type(optimizer) not in _BY_ELEMENT for optimizer in trainer.optimizers)
    )


def _is_own(owner: Any, name: str) -> bool:
    """Whether a hook is defined outside Lightning (either namespace) and outside this package."""
    if name in vars(owner):
        return True
    definers = [cls for cls in type(owner).__mro__ if name in vars(cls)]
    return bool(definers) and definers[0].__module__.partition(".")[0] not in _NOT_OWN
