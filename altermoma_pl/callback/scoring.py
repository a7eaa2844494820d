"""A scoring event: its batches, its loss, its target, the channels, and what to do when memory is full."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from altermoma_pl.callback.lightning_internals import log_silenced, scoring_bar
from altermoma_pl.callback.loaders import ProbeLoader, probe_batches, training_batches
from altermoma_pl.granularity import Granularity, Sparsity, Traced
from altermoma_pl.granularity.base import make_calibration
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.model.contexts import generators_restored, seed_generators
from altermoma_pl.model.distributed import of_first, together
from altermoma_pl.score import Calibration, LossFunction
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
) -> Traced | None:
    """The channels of the module, which is left as it was, as are random numbers and loaders.

    With several processes each tries on a batch of its own, and those that the first has found are taken.
    Errors are those of `find_channels`, and a `ValueError` if there is no batch.
    """
    with together(ValueError), scoring_batches(callback, trainer, module, True) as (probes, _, _):
        found = granularity.trace(module, loss_function(trainer, module), probes, callback.prunable)
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
    return make_calibration(
        traced,
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


# The loss of a LightningModule, outside its training loop and without its logging.


def loss_function(trainer: Trainer, module: LightningModule) -> LossFunction:
    """`pruning_loss(batch, batch_idx)` of the module where it exists, else its `training_step`.

    In the Trainer's precision, except that there is no autocast: weights in float32 are scored so. It is a
    function of the model and `(batch_idx, batch)`, as `loaders.Batches` yields them.
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
    """Raise a `ValueError` before training if the module's loss is not that of one call of a function."""
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
