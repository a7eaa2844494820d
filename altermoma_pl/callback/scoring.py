"""A scoring event: its batches, its target, the channels of its model, and what to do when memory is full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.callback.lightning_internals import scoring_bar
from altermoma_pl.callback.loaders import ProbeLoader, probe_batches, training_batches
from altermoma_pl.callback.loss import loss_function
from altermoma_pl.granularity import Granularity, Sparsity, Traced
from altermoma_pl.granularity.channels.calibration import ChannelCalibration
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.model.contexts import generators_restored, seed_generators
from altermoma_pl.model.distributed import of_first, together
from altermoma_pl.score import Calibration
from altermoma_pl.score.calibration import Progress, known_length, no_progress

if TYPE_CHECKING:
    from altermoma_pl.callback.callback import AlterMOMACallback

_FULL = ("out of memory", "defaultcpuallocator", "not enough memory", "cublas_status_alloc_failed")


@contextmanager
def scoring_batches(
    callback: AlterMOMACallback, trainer: Trainer, module: LightningModule, needed: bool
) -> Iterator[tuple[Iterable[Any], Iterable[Any], Progress]]:
    """Probe batches, training batches and who is told of progress; no batches unless `needed`.

    On exit the generators of torch, numpy, `random` and the loaders are as they were.
    """
    with memory_advice(), generators_restored(), scoring_bar(trainer) as progress:
        seed_generators(callback.seed)  # a hook that makes a loader may draw random numbers
        if not needed:
            yield (), (), progress
            return
        probes = probe_batches(trainer, module, callback.loader)
        trainings = training_batches(trainer)
        try:
            yield probes, trainings, progress
        finally:
            probes.rewind()
            trainings.rewind()


def check_batches(trainer: Trainer, module: LightningModule, which: ProbeLoader) -> None:
    """Raise a `ValueError` if there is nothing to score on."""
    with generators_restored():
        found = {"held-out": probe_batches(trainer, module, which), "training": training_batches(trainer)}
        for kind, batches in found.items():
            if known_length(batches) == 0:
                raise ValueError(
                    f"the {kind} loader is empty, at least one batch is needed to score weights: check its "
                    f"data set, drop_last and the Trainer's limits on batches"
                )


def trace_channels(
    callback: AlterMOMACallback, granularity: Granularity, trainer: Trainer, module: LightningModule
) -> Traced:
    """The channels of the module, which is left as it was, as are random numbers and loaders.

    With several processes each tries on a batch of its own, and those that the first has found are taken.

    Raises:
        ModuleNotFoundError: Without torch-pruning.
        ValueError: As `find_channels`, or if there is no batch.
    """
    with together(ValueError), scoring_batches(callback, trainer, module, True) as (probes, _, _):
        batch = next(iter(probes), None)
        if batch is None:
            raise ValueError("the held-out loader gives no batch: at least one is needed to follow channels")
        loss = loss_function(trainer, module)
        found = granularity.trace(module, lambda model: loss(model, batch), callback.prunable)
    return of_first(found)


def calibration_of(
    callback: AlterMOMACallback,
    trainer: Trainer,
    module: LightningModule,
    traced: Traced | None,
    probes: Iterable[Any] = (),
    trainings: Iterable[Any] = (),
    progress: Progress = no_progress,
) -> Calibration:
    """All that a criterion may look at: of channels where they were traced, else of weights."""
    options: dict[str, Any] = {} if traced is None else {"channels": traced.channels}
    return (Calibration if traced is None else ChannelCalibration)(
        model=module,
        loss_fn=loss_function(trainer, module),
        probe_batches=probes,
        training_batches=trainings,
        modalities=callback.modalities,
        prunable=callback.prunable,
        masks=callback.masks,
        seed=callback.seed,
        progress=progress,
        on_nonfinite=callback.on_nonfinite,
        **options,
    )


def target_at(schedule: Schedule, sparsity: Sparsity, epoch: int, pruned: Sparsity) -> Sparsity:
    """The schedule's sparsity at `epoch`, and at least what is pruned already."""
    if isinstance(sparsity, dict) and isinstance(pruned, dict):
        return {
            group: max(schedule.sparsity_at(epoch, share), pruned.get(group, 0.0))
            for group, share in sparsity.items()
        }
    if isinstance(sparsity, dict) or isinstance(pruned, dict):
        raise TypeError(f"{sparsity} and {pruned} must both be one share or one of each group")
    return max(schedule.sparsity_at(epoch, sparsity), pruned)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Add to an error of the allocator that it came while scoring, and what helps.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: The kind of the original, which is the cause, with
            its text within, so that tools which look for it (Lightning's `is_oom_error`) still do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kind = next(k for k in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, k))
        if kind is RuntimeError and not any(text in str(error).lower() for text in _FULL):
            raise
        raise kind(
            f"out of memory while scoring weights; the model is as it was before. Score on smaller batches: "
            f"define `calibration_dataloader()` on the datamodule or the LightningModule with a smaller "
            f"batch_size; or choose a criterion that needs fewer copies of the weights, such as Taylor() or "
            f"Magnitude(). The original error: {str(error) or type(error).__name__}"
        ) from error
