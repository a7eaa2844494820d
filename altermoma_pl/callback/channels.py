"""Channels of the module that is trained, from the loss on its first probe batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from altermoma_pl.callback.loaders import ProbeLoader
from altermoma_pl.callback.loss import loss_function
from altermoma_pl.callback.memory import memory_advice
from altermoma_pl.callback.scoring import scoring_batches
from altermoma_pl.granularity import Granularity, Traced
from altermoma_pl.granularity.channels.calibration import ChannelCalibration
from altermoma_pl.model.distributed import of_first, together
from altermoma_pl.score import Calibration


def trace_channels(
    granularity: Granularity,
    trainer: Trainer,
    module: LightningModule,
    which: ProbeLoader,
    seed: int,
    prunable: list[str],
) -> Traced:
    """The channels of the module, which is left as it was, as are random numbers and loaders.

    With several processes each tries on a batch of its own, and those that the first has found are taken.

    Raises:
        ModuleNotFoundError: Without torch-pruning.
        ValueError: As `find_channels`, or if there is no batch.
    """
    with memory_advice(), together(ValueError):
        found = _trace(granularity, trainer, module, which, seed, prunable)
    return of_first(found)


def _trace(
    granularity: Granularity,
    trainer: Trainer,
    module: LightningModule,
    which: ProbeLoader,
    seed: int,
    prunable: list[str],
) -> Traced:
    with scoring_batches(trainer, module, which, seed, needed=True) as (probes, _, _):
        batch = next(iter(probes), None)
        if batch is None:
            raise ValueError("the held-out loader gives no batch: at least one is needed to follow channels")
        loss = loss_function(trainer, module)

        def forward(model: nn.Module) -> Tensor:
            return loss(model, batch)

        return granularity.trace(module, forward, prunable)


def calibration_for(traced: Traced | None, *options: Any) -> Calibration:
    """A calibration of channels where they were traced, else of weights."""
    return Calibration(*options) if traced is None else ChannelCalibration(*options, channels=traced.channels)
