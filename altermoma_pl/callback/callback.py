"""`AlterMOMACallback`: prunes a fusion model between the epochs of `Trainer.fit`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl.callback.announcement import announce
from altermoma_pl.callback.channels import calibration_for, trace_channels
from altermoma_pl.callback.checks import (
    check_disjoint,
    check_granularity,
    check_long_enough,
    check_name,
    check_not_late,
    check_options,
    check_parts,
    check_same_groups,
    check_sharding,
    check_strategy,
    check_zeros,
    warn_if_short,
)
from altermoma_pl.callback.gradients import reads_gradients
from altermoma_pl.callback.interruptions import signals_held
from altermoma_pl.callback.loaders import ProbeLoader
from altermoma_pl.callback.loss import check_loss, loss_function
from altermoma_pl.callback.memory import memory_advice
from altermoma_pl.callback.rewinding import RewindPoint, check_rewindable
from altermoma_pl.callback.scoring import check_batches, scoring_batches, target_at
from altermoma_pl.callback.state import PruningState
from altermoma_pl.callback.stateful import Stateful
from altermoma_pl.enforce.enforcement import Enforcement
from altermoma_pl.granularity import Granularity, Ranking, Sparsity, input_dims, parse_granularity
from altermoma_pl.mask.computed import Computed
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.schedules import Cubic, Schedule
from altermoma_pl.mask.top_k import Scope
from altermoma_pl.model.modality import Modalities
from altermoma_pl.score import AlterEva, Calibration, Criterion
from altermoma_pl.score.calibration import OnNonFinite, no_progress
from altermoma_pl.score.decision import Decision, decide

_NEVER = -1  # an epoch before any event of any schedule


class AlterMOMACallback(Stateful):
    """Scores the weights of a multi-sensor model and prunes them between epochs.

    An event of the schedule happens in `on_train_epoch_start`, before the first batch of its epoch:
    the weights are scored on held-out batches, ranked, masked, and the optimizers' moments of pruned
    weights set to zero. Scoring leaves the run as it was, bit for bit. From then on pruned
    weights are set to zero after every optimizer step, and their gradients before clipping; so are
    averaged copies of the module that other callbacks hold. Masks are saved in the checkpoint, beside a
    plain `state_dict` that loads without this package.

    The loss is the module's own: `pruning_loss(batch, batch_idx)` where the module has it, else
    `training_step`, with `self.log` silenced. Modules with manual optimization need `pruning_loss`.

    With `fast_dev_run` there is one event, at epoch 0 and to the final sparsity, whatever the
    schedule. On several devices (DDP, or FSDP2 through `ModelParallelStrategy`) scores are means over the
    batches of all processes, and masks are proved to be the same on all.

    Example:
        >>> callback = AlterMOMACallback(
        ...     modalities={"camera": ["encoders.camera"], "lidar": ["encoders.lidar"]}, sparsity=0.9
        ... )

    Args:
        modalities: Modality -> patterns over module paths, for at least two (see `Modalities`).
        sparsity: Share of zeros among prunable weights after the last event, in [0, 1); or one for
            each modality and "shared", with the scope "modality".
        criterion: Scores the weights.
        schedule: At which epochs, and how far; whether events bring the run back to an earlier state.
        scope: Over what weights compete: "global", in each "modality", "layer", or output "row" of a layer.
        min_density: Share of each tensor that stays whatever its scores, at least one weight; 0 for no floor.
        prunable: Patterns over parameter names that add to the weights of convolution, linear and
            attention layers; with a leading `!` they remove.
        loader: Batches to score on: those of `calibration_dataloader()` of the datamodule or module,
            the "validation" loader, the "training" loader, or "auto", the first of the first two.
        seed: For random numbers drawn while scoring.
        output_dir: Where reports and figures go; None for a folder `pruning` in the logger's directory,
            and nowhere without a logger.
        figures: Draw figures (needs matplotlib), to files and to TensorBoard where it is used.
        store_components: Keep DeCI and ReRI of the latest event, in memory and in checkpoints; they are
            two to four times as large as the prunable weights.
        name: Tells several of these callbacks in one Trainer apart: in checkpoints, and in metrics and
            folders (`pruning/NAME`). They must prune different weights.
        granularity: What is pruned as one piece: a "weight", N of every M inputs ("2:4"), or a "channel" in
            all coupled layers, with the options of `Channel`; the sparsity is then a share of channels.
        on_nonfinite: Whether a batch whose loss or gradient is not finite ends the run with an error,
            "raise", or is left out of the scores and counted, "skip".

    Raises:
        TypeError: If patterns are not strings.
        ValueError: If an option is outside what is described.
    """

    def __init__(
        self,
        modalities: dict[str, str | list[str]],
        sparsity: float | dict[str, float] = 0.9,
        criterion: Criterion = AlterEva(),
        schedule: Schedule = Cubic(),
        scope: Scope = "global",
        min_density: float = 0.01,
        prunable: list[str] | None = None,
        loader: ProbeLoader = "auto",
        seed: int = 0,
        output_dir: str | None = None,
        figures: bool = True,
        store_components: bool = False,
        name: str | None = None,
        on_nonfinite: OnNonFinite = "raise",
        granularity: str | Granularity = "weight",
    ) -> None:
        check_name(name)
        super().__init__(name)
        self.modalities = Modalities(modalities)
        self.sparsity = sparsity
        self.criterion = criterion
        self.schedule = schedule
        self.scope = scope
        self.min_density = min_density
        self.prunable = prunable or []
        self.loader = loader
        self.seed = seed
        self.output_dir = output_dir
        self.figures = figures
        self.store_components = store_components
        self.on_nonfinite = on_nonfinite
        self.granularity = granularity
        self._grain = parse_granularity(granularity)
        check_options(self.modalities, sparsity, scope, min_density, loader, on_nonfinite)
        others = {"figures": (figures, bool), "store_components": (store_components, bool)}
        folder = None if isinstance(output_dir, Path) else output_dir
        check_parts(criterion, schedule, prunable, seed, output_dir=(folder, str | None), **others)
        check_granularity(self._grain, criterion, sparsity, scope, min_density, store_components)

    # When: Lightning's hooks, in the order in which they come.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if stage != "fit":
            return
        self._traced = None
        check_strategy(trainer)
        if not _is_trial(trainer):
            check_long_enough(self.schedule, trainer.max_epochs)
        check_loss(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find modalities and weights, take up loaded masks, and hold them from now on."""
        check_sharding(pl_module, self.criterion, self.schedule, self._grain, self.store_components)
        self._take_up(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was loaded since: with sharded parameters that is later than `on_fit_start`."""
        self._take_up(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what no event could mend; start the schedule anew in a fit that starts anew."""
        if self.criterion.uses_batches or self._grain.by_channel:
            check_batches(trainer, pl_module, self.loader)
        if self._grain.by_channel:
            self._traced = trace_channels(
                self._grain, trainer, pl_module, self.loader, self.seed, self.prunable
            )
        self._take_up(trainer, pl_module)
        anew = trainer.global_step == 0
        point = None if anew else self._state.rewind_point
        if not _is_trial(trainer):
            missing = self._grain.missing(self.sparsity, self._ranking(self._state))
            check_not_late(self.schedule, trainer.current_epoch, missing, self._grain.share_of)
            if missing:
                check_rewindable(self.schedule, point, trainer.current_epoch)
        if point is not None and self.schedule.rewinds_to is not None:
            point.check_fits(trainer, pl_module)
        self._masks_gradients = reads_gradients(trainer, pl_module)
        self._state.rewind_point = point
        if anew:
            self._state.last_event_epoch = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and prune if the schedule says so."""
        if self._enforcement is not None:
            self._enforcement.follow(trainer.optimizers)
        epoch = trainer.current_epoch
        if epoch <= self._state.last_event_epoch:
            return
        trial, point = _is_trial(trainer), self._state.rewind_point
        if epoch == self.schedule.rewinds_to and (point is None or point.epoch != epoch):
            self._state.rewind_point = RewindPoint.take(trainer, pl_module)
        if epoch == 0 if trial else self.schedule.is_due(epoch):
            with signals_held():
                self._prune(trainer, pl_module, epoch)
        if epoch >= self.schedule.last_epoch:
            self._state.rewind_point = None  # nothing is left that would need it

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Catch up: a resumed run may enter an epoch without its start hook."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what training left in the module, averages too; say so if it ended before the last event."""
        self._hold(trainer, pl_module)
        if self._grain.by_channel and self._traced is None:
            return  # no training, so that no channels were looked for
        missing = self._grain.missing(self.sparsity, self._ranking(self._state))
        sparsity = self.report().sparsity
        if trainer.is_global_zero:
            warn_if_short(self.schedule, sparsity, missing, self._grain.share_of)

    # What happens in an event, and before the first.

    def _take_up(self, trainer: Trainer, module: LightningModule) -> None:
        if self._grain.by_channel:
            if self._traced is None:
                self._hold_loaded(trainer, module)
                return
        elif self._enforcement is not None and self._enforcement.masks is self._state.masks:
            return
        self._input_dims = input_dims(module)
        calibration = self._calibration(trainer, module)
        masks = (self._state.masks or Masks.dense(calibration.masked)).to(module)
        if self._state.masks is not None:
            check_same_groups(self._state.group_of, calibration.owner_of)
            check_zeros(masks, module)
        for other in self._others(trainer):
            check_disjoint(masks, other.masks or (), self.name, other.name)
        state = replace(self._state, masks=masks, group_of=calibration.owner_of)
        self._grain.check_reachable(self.sparsity, self._ranking(state))
        self._release()
        self._state = state
        self._enforcement = Enforcement(module, masks, trainer.optimizers)

    def _prune(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        if self._enforcement is None:
            raise RuntimeError("AlterMOMACallback holds no masks: on_fit_start of this fit did not run")
        target = self._target(self.schedule.last_epoch if _is_trial(trainer) else epoch)
        if self.report().sparsity > 0 and target == self._target(_NEVER):
            self._state.last_event_epoch = epoch
            return  # a fit that goes on with a pruned model has nothing more to prune
        started = time.perf_counter()
        check_rewindable(self.schedule, self._state.rewind_point, epoch)
        decision = self._decide(trainer, module, target)
        if self.schedule.rewinds_to is not None and self._state.rewind_point is not None:
            self._state.rewind_point.restore_(trainer, module)
        state = replace(self._state, events=list(self._state.events))
        state.record(decision, epoch, trainer.global_step, self.store_components, self._traced)
        self._state = state  # one assignment: whatever interrupts finds masks and their record
        for callback in (self, *self._others(trainer)):  # rewinding brought back what others had pruned
            callback._hold(trainer, module)
        seconds = time.perf_counter() - started
        self._scoring_seconds += seconds
        announce(trainer, state, decision.components, seconds, self.name, self.output_dir, self.figures)

    def _ranking(self, state: PruningState) -> Ranking:
        if state.masks is None:
            raise ValueError("there are no masks to rank within: nothing was found to prune yet")
        within, dims = self._traced, self._input_dims
        return Ranking(state.masks, state.group_of, self.scope, self.min_density, None, within, dims)

    def _target(self, epoch: int) -> Sparsity:
        pruned = self._grain.pruned(self._ranking(self._state), isinstance(self.sparsity, dict))
        return target_at(self.schedule, self.sparsity, epoch, pruned)

    def _decide(self, trainer: Trainer, module: LightningModule, target: Sparsity) -> Decision:
        """What stays, with the generators of torch, numpy, `random` and the loaders as they were."""
        needed = self.criterion.uses_batches
        with memory_advice(), scoring_batches(trainer, module, self.loader, self.seed, needed) as batches:
            calibration = self._calibration(trainer, module, *batches)
            weights = calibration.weights
            magnitudes = Computed(weights, lambda name: weights[name].detach().abs())
            ranking = replace(self._ranking(self._state), tie_breaker=magnitudes)
            return decide(self.criterion, calibration, lambda s: self._grain.masks(s, target, ranking))

    def _calibration(self, trainer: Trainer, module: LightningModule, *batches: Any) -> Calibration:
        probes, trainings, progress = batches or ((), (), no_progress)
        loss, masks, seed = loss_function(trainer, module), self._state.masks, self.seed
        return calibration_for(
            self._traced, module, loss, probes, trainings, self.modalities, self.prunable, masks, seed,
            progress, self.on_nonfinite,
        )  # fmt: skip


def _is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`."""
    return bool(getattr(trainer, "fast_dev_run", False))
