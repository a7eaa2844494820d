"""What the callback holds: the state of pruning, and during fit weights at zero."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from altermoma_pl.callback.checks import callbacks_of, check_zeros
from altermoma_pl.callback.interruptions import resume_with_first_batch
from altermoma_pl.callback.state import PruningState
from altermoma_pl.enforce.copies import hold_everywhere_
from altermoma_pl.enforce.enforcement import Enforcement
from altermoma_pl.granularity import Traced
from altermoma_pl.mask.masks import Masks
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import Components


class Stateful(Callback):
    """A callback that holds the state of pruning, and during fit what keeps weights at zero.

    Args:
        name: Tells several of them in one Trainer apart; None where there is one.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._state = PruningState()
        self._enforcement: Enforcement | None = None
        self._traced: Traced | None = None
        self._input_dims: dict[str, int] = {}
        self._masks_gradients = False
        self._scoring_seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take no optimizers and hooks of a running fit along."""
        return {**vars(self), "_enforcement": None, "_traced": None}

    @property
    def masks(self) -> Masks | None:
        """What is pruned; None before fit."""
        return self._state.masks

    @property
    def components(self) -> Components | None:
        """DeCI and ReRI of the latest event, where the criterion has them and `store_components` is set."""
        return self._state.components

    @property
    def events(self) -> list[dict[str, Any]]:
        """One entry for each event, oldest first: epoch, sparsity, kept shares, losses, a beta if chosen."""
        return self._state.events

    @property
    def scoring_seconds(self) -> float:
        """Time spent in events by this process, in seconds; a resumed run counts from 0."""
        return self._scoring_seconds

    def report(self) -> SparsityReport:
        """What is pruned where; a `ValueError` before fit."""
        return self._state.report()

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints: the name of the class, `[name]` behind it if there is one."""
        return super().state_key if self.name is None else f"{super().state_key}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """Masks, schedule position, history and components."""
        return self._state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; nothing is changed if it is damaged."""
        state = PruningState.from_state_dict(state_dict)
        if self._enforcement is not None and state.masks is not None:  # during fit: by a tuner
            state.masks = state.masks.to(self._enforcement.model)
        self._state = state

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take pruned weights out of the gradient, before anything clips it or measures it."""
        if self._enforcement is not None and self._masks_gradients:
            self._enforcement.hold_gradients_()

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
            self._hold(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never save masks and weights that disagree, nor counts that skip the epoch that begins."""
        self._hold(trainer, pl_module, checkpoint["state_dict"])
        resume_with_first_batch(checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo half a step, or finish half an event; then let go of the optimizers."""
        self._hold(trainer, pl_module)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def _hold(self, trainer: Trainer, module: LightningModule, saved: dict[str, Any] | None = None) -> None:
        """Bring the weights, and copies of them, in line with the state's masks; only during fit."""
        if self._enforcement is None or self._state.masks is None:
            return
        if self._enforcement.masks is not self._state.masks:
            self._enforcement.masks = self._state.masks
        hold_everywhere_(callbacks_of(trainer), module, self._state.masks, saved)

    def _hold_loaded(self, trainer: Trainer, module: LightningModule) -> None:
        """What a checkpoint has pruned is held as it is until the channels are known."""
        if self._state.masks is None:
            return
        if self._enforcement is not None and self._enforcement.masks is self._state.masks:
            return
        self._state.masks = self._state.masks.to(module)
        check_zeros(self._state.masks, module)
        self._release()
        self._enforcement = Enforcement(module, self._state.masks, trainer.optimizers)

    def _others(self, trainer: Trainer) -> list[Stateful]:
        return [each for each in callbacks_of(trainer) if isinstance(each, Stateful) and each is not self]

    def _release(self) -> None:
        if self._enforcement is not None:
            self._enforcement.release()
        self._enforcement = None
