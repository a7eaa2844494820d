"""A scoring event: its batches, its target, and from scores to masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.callback.checks import check_not_empty
from altermoma_pl.callback.loaders import ProbeLoader, probe_batches, training_batches
from altermoma_pl.callback.progress import scoring_bar
from altermoma_pl.contexts import generators_restored, seed_generators
from altermoma_pl.criteria import (
    AlterEva,
    Calibration,
    Components,
    Criterion,
    MakeMasks,
    Scores,
    choose_beta,
)
from altermoma_pl.criteria.base import Progress
from altermoma_pl.distributed import check_same, is_sharded, num_processes, sum_, sums
from altermoma_pl.granularity import Sparsity
from altermoma_pl.masks import Masks
from altermoma_pl.schedules import Schedule


@dataclass(frozen=True)
class Decision:
    """What an event decides.

    Args:
        masks: What stays.
        components: DeCI and ReRI, where the criterion has them.
        beta: The beta that was chosen, where the criterion's is "auto".
        beta_losses: Loss of the pruned model for each candidate, as `choose_beta` returns them.
        num_skipped: Batches of all processes that were left out because they were not finite.
    """

    masks: Masks
    components: Components | None = None
    beta: float | None = None
    beta_losses: dict[float, float] = field(default_factory=dict)
    num_skipped: int = 0


def decide(criterion: Criterion, calibration: Calibration, make_masks: MakeMasks) -> Decision:
    """Score and rank; the model is left as it was.

    Raises:
        RuntimeError: If processes come to different masks.
    """
    decision = _decide(criterion, calibration, make_masks)
    if num_processes() > 1:
        check_same(decision.masks.digest, "the masks")
    return replace(decision, num_skipped=int(sums([calibration.num_skipped])[0]))


def _decide(criterion: Criterion, calibration: Calibration, make_masks: MakeMasks) -> Decision:
    if not isinstance(criterion, AlterEva):
        return Decision(make_masks(_mean_over_processes(criterion.score(calibration))))
    components = criterion.components(calibration)
    if criterion.beta != "auto":
        return Decision(make_masks(criterion.combine(components, calibration.alive)), components)
    chosen, losses = choose_beta(criterion, components, calibration, make_masks)
    masks = make_masks(chosen.combine(components, calibration.alive))
    return Decision(masks, components, float(chosen.beta), losses)


def _mean_over_processes(scores: Scores) -> Scores:
    """The scores of a criterion that knows nothing of processes are those of its own batches."""
    if num_processes() == 1 or is_sharded(scores.values()):
        return scores
    return {name: sum_(score.detach().clone()).div_(num_processes()) for name, score in scores.items()}


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
