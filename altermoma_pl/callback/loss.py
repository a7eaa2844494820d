"""The loss of a LightningModule, outside its training loop and without its logging."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from altermoma_pl.callback.lightning_internals import log_silenced
from altermoma_pl.score import LossFunction


def loss_function(trainer: Trainer, module: LightningModule) -> LossFunction:
    """`pruning_loss(batch, batch_idx)` of the module where it exists, else its `training_step`.

    In the Trainer's precision, except that there is no autocast: weights in float32 are scored so.

    The function that is returned takes `(batch_idx, batch)` pairs, as `loaders.Batches` yields them.
    """
    step = _bind(module, _step_name(module))
    mixed = str(trainer.precision).endswith("mixed")

    def loss(_: nn.Module, numbered_batch: tuple[int, Any]) -> Tensor:
        index, batch = numbered_batch
        precision = nullcontext() if mixed else trainer.precision_plugin.train_step_context()
        with log_silenced(module), precision:
            return _as_tensor(step(batch, index), _step_name(module))

    return loss


def check_step(module: LightningModule) -> None:
    """Raise before training if the module's loss cannot be computed by calling one function.

    Raises:
        ValueError: If the module optimises manually and has no `pruning_loss`, or its step takes an
            iterator.
    """
    if not module.automatic_optimization and _step_name(module) == "training_step":
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, so its training_step changes weights and "
            f"cannot be used to score them: define `pruning_loss(self, batch, batch_idx)` that returns "
            f"the loss as a scalar tensor"
        )
    if "dataloader_iter" in inspect.signature(getattr(module, _step_name(module))).parameters:
        raise ValueError(
            f"training_step of {type(module).__name__} takes an iterator over batches: define "
            f"`pruning_loss(self, batch, batch_idx)` that returns the loss of one batch"
        )


def _step_name(module: LightningModule) -> str:
    return "pruning_loss" if hasattr(module, "pruning_loss") else "training_step"


def _bind(module: LightningModule, name: str) -> Callable[[Any, int], Any]:
    """The step as a function of batch and index, whichever of `batch_idx` and `dataloader_idx` it takes."""
    step = getattr(module, name)
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return lambda batch, index: step(batch, index)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = sum(p.default is p.empty or p.name in ("batch_idx", "dataloader_idx") for p in positional)
    return lambda batch, index: step(*(batch, index, 0)[:count])


def _as_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    if isinstance(output, torch.Tensor):
        return output
    raise ValueError(
        f"{name} returned no loss but {type(output).__name__}: to score weights it must return a tensor or a "
        f"dictionary with the key 'loss' for every batch; define `pruning_loss(self, batch, batch_idx)` "
        f"if it cannot"
    )
