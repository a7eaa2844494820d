"""`AlterMOMACallback`: prunes a fusion model between the epochs of `Trainer.fit`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_type_hints

from lightning.pytorch import Callback, LightningModule, Trainer

from altermoma_pl.callback import checks
from altermoma_pl.callback import lightning_internals as internals
from altermoma_pl.callback.announcement import announce
from altermoma_pl.callback.loaders import ProbeLoader
from altermoma_pl.callback.rewinding import RewindPoint, check_rewindable
from altermoma_pl.callback.scoring import (
    calibration_of,
    check_batches,
    check_step,
    scoring_batches,
    target_at,
    trace_channels,
)
from altermoma_pl.callback.state import Held, PruningState
from altermoma_pl.granularity import Granularity, Ranking, Sparsity, parse_granularity
from altermoma_pl.granularity.base import input_dims
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.schedules import Cubic, Schedule
from altermoma_pl.mask.top_k import Scope
from altermoma_pl.model.modality import Modalities
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import AlterEva, Components, Criterion
from altermoma_pl.score.calibration import OnNonFinite
from altermoma_pl.score.decision import decide

_NEVER = -1  # an epoch before any event of any schedule


class AlterMOMACallback(Callback):
    """Scores the weights of a multi-sensor model and prunes them between epochs.

    An event of the schedule happens in `on_train_epoch_start`, before the first batch of its epoch:
    the weights are scored on held-out batches, ranked, masked, and the optimizers' moments of pruned
    weights set to zero. Scoring leaves the run as it was, bit for bit. From then on pruned weights are
    zero after every optimizer step; their gradients are too where something reads many together, as clipping
    does; averaged copies that other callbacks hold are at events, validation and saves. Masks are saved in
    the checkpoint, beside a plain `state_dict` that loads without this package.

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
        granularity: What is pruned as one piece: a "weight", N of every M inputs ("2:4"), or a "channel" in
            all coupled layers, with the options of `Channel`; the sparsity is then a share of channels.
        min_density: Share of each tensor that stays whatever its scores, at least one weight; 0 for no floor.
        prunable: Patterns over parameter names that add to the weights of convolution, linear and
            attention layers; with a leading `!` they remove.
        loader: Batches to score on: those of `calibration_dataloader()` of the datamodule or module,
            the "validation" loader, the "training" loader, or "auto", the first of the first two.
        on_nonfinite: Whether a batch whose loss or gradient is not finite ends the run with an error,
            "raise", or is left out of the scores and counted, "skip".
        seed: For random numbers drawn while scoring.
        store_components: Keep DeCI and ReRI of the latest event, in memory and in checkpoints; they are
            two to four times as large as the prunable weights.
        output_dir: Where reports and figures go; None for a folder `pruning` in the logger's directory,
            and nowhere without a logger.
        figures: Draw figures (needs matplotlib), to files and to TensorBoard where it is used.
        name: Tells several of these callbacks in one Trainer apart: in checkpoints, and in metrics and
            folders (`pruning/NAME`). They must prune different weights.

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
        granularity: str | Granularity = "weight",
        min_density: float = 0.01,
        prunable: list[str] | None = None,
        loader: ProbeLoader = "auto",
        on_nonfinite: OnNonFinite = "raise",
        seed: int = 0,
        store_components: bool = False,
        output_dir: str | None = None,
        figures: bool = True,
        name: str | None = None,
    ) -> None:
        self.modalities = Modalities(modalities)
        # Hydra gives mappings and sequences of its own, and checkpoints hold builtins only.
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.criterion = criterion
        self.schedule = schedule
        self.scope = scope
        self.granularity = granularity
        self.min_density = min_density
        self.loader = loader
        self.on_nonfinite = on_nonfinite
        self.seed = seed
        self.store_components = store_components
        self.output_dir = output_dir
        self.figures = figures
        self.name = name
        self._grain = parse_granularity(granularity)
        self._held = Held()
        self._masks_gradients = False
        self._scoring_seconds = 0.0
        checks.check_options_of(self, prunable, get_type_hints(AlterMOMACallback.__init__))
        self.prunable = list(prunable or ())

    # What is held, for the user and for checkpoints.

    @property
    def masks(self) -> Masks | None:
        """What is pruned; None before fit."""
        return self._held.state.masks

    @property
    def components(self) -> Components | None:
        """DeCI and ReRI of the latest event, where the criterion has them and `store_components` is set."""
        return self._held.state.components

    @property
    def events(self) -> list[dict[str, Any]]:
        """One entry for each event, oldest first: epoch, sparsity, kept shares, losses, a beta if chosen."""
        return self._held.state.events

    @property
    def scoring_seconds(self) -> float:
        """Time spent in events by this process, in seconds; a resumed run counts from 0."""
        return self._scoring_seconds

    def report(self) -> SparsityReport:
        """What is pruned where; a `ValueError` before fit."""
        return self._held.state.report()

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints: the name of the class, `[name]` behind it if there is one."""
        return super().state_key if self.name is None else f"{super().state_key}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """Masks, schedule position, history and components."""
        return self._held.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; nothing is changed if it is damaged."""
        self._held.load(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no optimizers and hooks of a running fit along."""
        return {**vars(self), "_held": Held(self._held.state)}

    # When: Lightning's hooks, in the order in which they come.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if stage != "fit":
            return
        self._held.traced = None
        checks.check_strategy(trainer)
        if not internals.is_trial(trainer):
            checks.check_long_enough(self.schedule, trainer.max_epochs)
        check_step(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find modalities and weights, take up loaded masks, and hold them from now on."""
        checks.check_sharding(pl_module, self.criterion, self.schedule, self._grain, self.store_components)
        self._take_up(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what was loaded since: with sharded parameters that is later than `on_fit_start`."""
        self._take_up(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what no event could mend; start the schedule anew in a fit that starts anew."""
        if self.criterion.uses_batches or self._grain.by_channel:
            check_batches(trainer, pl_module, self.loader)
        if self._grain.by_channel:
            self._held.traced = trace_channels(self, self._grain, trainer, pl_module)
        self._take_up(trainer, pl_module)
        anew, state = trainer.global_step == 0, self._held.state
        point = None if anew else state.rewind_point
        if not internals.is_trial(trainer):
            missing = self._grain.missing(self.sparsity, self._ranking(state))
            checks.check_not_late(self.schedule, trainer.current_epoch, missing, self._grain.share_of)
            if missing:
                check_rewindable(self.schedule, point, trainer.current_epoch)
        if point is not None and self.schedule.rewinds_to is not None:
            point.check_fits(trainer, pl_module)
        self._masks_gradients = internals.reads_gradients(trainer, pl_module)
        state.rewind_point = point
        if anew:
            state.last_event_epoch = _NEVER

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and prune if the schedule says so."""
        if self._held.enforcement is not None:
            self._held.enforcement.follow(trainer.optimizers)
        epoch, state = trainer.current_epoch, self._held.state
        if epoch <= state.last_event_epoch:
            return
        point = state.rewind_point
        if epoch == self.schedule.rewinds_to and (point is None or point.epoch != epoch):
            state.rewind_point = RewindPoint.take(trainer, pl_module)
        if epoch == 0 if internals.is_trial(trainer) else self.schedule.is_due(epoch):
            with internals.signals_held():
                self._prune(trainer, pl_module, epoch)
        if epoch >= self.schedule.last_epoch:
            self._held.state.rewind_point = None  # nothing is left that would need it

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Catch up: a resumed run may enter an epoch without its start hook."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take pruned weights out of the gradient, before anything clips it or measures it."""
        if self._held.enforcement is not None and self._masks_gradients:
            self._held.enforcement.hold_gradients_()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """By now averages have been exchanged with the weights: validate what will be saved."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._held.hold_(internals.callbacks_of(trainer), pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never save masks and weights that disagree, nor counts that skip the epoch that begins."""
        self._held.hold_(internals.callbacks_of(trainer), pl_module, checkpoint["state_dict"])
        internals.resume_with_first_batch(checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo half a step, or finish half an event; then let go of the optimizers."""
        self._held.hold_(internals.callbacks_of(trainer), pl_module)
        self._held.release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what training left in the module, averages too; say so if it ended before the last event."""
        self._held.hold_(internals.callbacks_of(trainer), pl_module)
        if self._grain.by_channel and self._held.traced is None:
            return  # no training, so that no channels were looked for
        missing = self._grain.missing(self.sparsity, self._ranking(self._held.state))
        sparsity = self.report().sparsity
        if trainer.is_global_zero:
            checks.warn_if_short(self.schedule, sparsity, missing, self._grain.share_of)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._held.release()

    # What happens in an event, and before the first.

    def _take_up(self, trainer: Trainer, module: LightningModule) -> None:
        """Hold what was loaded; find what can be pruned, as soon as that can be known."""
        if self._held.traced is None and self._held.enforces_state:
            return
        loaded = state = self._held.state
        known = self._held.traced is not None or not self._grain.by_channel
        if known:
            self._held.input_dims = input_dims(module)
            calibration = calibration_of(self, trainer, module, self._held.traced)
            masks = loaded.masks or Masks.dense(calibration.masked)
            state = replace(loaded, masks=masks, group_of=calibration.owner_of)
        if state.masks is None:
            return  # which channels there are is found when training starts
        state.masks = state.masks.to(module)
        if loaded.masks is not None:
            checks.check_same_groups(loaded.group_of, state.group_of)
            checks.check_zeros(state.masks, module)
        for other in self._others(trainer):
            checks.check_disjoint(state.masks, other.masks or (), self.name, other.name)
        if known:
            self._grain.check_reachable(self.sparsity, self._ranking(state))
        self._held.take_up(state, module, trainer.optimizers)

    def _prune(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        state = self._held.state
        if self._held.enforcement is None:
            raise RuntimeError("AlterMOMACallback holds no masks: on_fit_start of this fit did not run")
        target = self._target(self.schedule.last_epoch if internals.is_trial(trainer) else epoch)
        if self.report().sparsity > 0 and target == self._target(_NEVER):
            state.last_event_epoch = epoch
            return  # a fit that goes on with a pruned model has nothing more to prune
        started = time.perf_counter()
        check_rewindable(self.schedule, state.rewind_point, epoch)
        with scoring_batches(self, trainer, module, self.criterion.uses_batches) as batches:
            calibration = calibration_of(self, trainer, module, self._held.traced, *batches)
            ranking = Ranking.of(calibration, self.scope, self.min_density, self._held.traced)
            decision = decide(self.criterion, calibration, lambda s: self._grain.masks(s, target, ranking))
        if self.schedule.rewinds_to is not None and state.rewind_point is not None:
            state.rewind_point.restore_(trainer, module)
        state = replace(state, events=list(state.events))
        state.record(decision, epoch, trainer.global_step, self.store_components, self._held.traced)
        self._held.state = state  # one assignment: whatever interrupts finds masks and their record
        for callback in [self, *self._others(trainer)]:  # rewinding brought back what others had pruned
            callback._held.hold_(internals.callbacks_of(trainer), module)
        seconds = time.perf_counter() - started
        self._scoring_seconds += seconds
        announce(self, trainer, decision.components, seconds)

    def _ranking(self, state: PruningState) -> Ranking:
        return self._held.ranking(state, self.scope, self.min_density)

    def _target(self, epoch: int) -> Sparsity:
        pruned = self._grain.pruned(self._ranking(self._held.state), isinstance(self.sparsity, dict))
        return target_at(self.schedule, self.sparsity, epoch, pruned)

    def _others(self, trainer: Trainer) -> list[AlterMOMACallback]:
        found = internals.callbacks_of(trainer)
        return [each for each in found if isinstance(each, AlterMOMACallback) and each is not self]
