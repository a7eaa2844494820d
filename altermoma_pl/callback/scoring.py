"""A scoring event: its batches and its target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.callback.checks import Sparsity, check_not_empty
from altermoma_pl.callback.loaders import ProbeLoader, probe_batches, training_batches
from altermoma_pl.callback.progress import scoring_bar
from altermoma_pl.contexts import generators_restored, seed_generators
from altermoma_pl.criteria.base import Progress
from altermoma_pl.report import SparsityReport
from altermoma_pl.schedules import Schedule


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


def target_at(schedule: Schedule, sparsity: Sparsity, epoch: int, report: SparsityReport) -> Sparsity:
    """The schedule's sparsity at `epoch`, and at least what is pruned already."""
    if not isinstance(sparsity, dict):
        return max(schedule.sparsity_at(epoch, sparsity), report.sparsity)
    return {
        group: max(schedule.sparsity_at(epoch, share), 1 - report.groups[group].kept)
        for group, share in sparsity.items()
    }
