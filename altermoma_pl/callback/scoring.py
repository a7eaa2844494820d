"""A scoring event: its batches, its target, and from scores to masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.callback.checks import check_not_empty
from altermoma_pl.callback.loaders import ProbeLoader, probe_batches, training_batches
from altermoma_pl.callback.progress import scoring_bar
from altermoma_pl.granularity import Sparsity
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.model.contexts import generators_restored, seed_generators
from altermoma_pl.score.calibration import Progress


@contextmanager
def scoring_batches(
    trainer: Trainer, module: LightningModule, which: ProbeLoader, seed: int, needed: bool
) -> Iterator[tuple[Iterable[Any], Iterable[Any], Progress]]:
    """Probe batches, training batches and who is told of progress; no batches unless `needed`.

    On exit the generators of torch, numpy, `random` and the loaders are as they were.
    """
    with generators_restored(), scoring_bar(trainer) as progress:
        seed_generators(seed)  # a hook that makes a loader may draw random numbers
        if not needed:
            yield (), (), progress
            return
        probes, trainings = probe_batches(trainer, module, which), training_batches(trainer)
        try:
            yield probes, trainings, progress
        finally:
            probes.rewind()
            trainings.rewind()


def check_batches(trainer: Trainer, module: LightningModule, which: ProbeLoader) -> None:
    """Raise a `ValueError` if there is nothing to score on."""
    with generators_restored():
        check_not_empty(probe_batches(trainer, module, which), "held-out")
        check_not_empty(training_batches(trainer), "training")


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
