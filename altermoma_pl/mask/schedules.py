"""Schedules: at which epochs to prune, and how far. Frozen and stateless."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from altermoma_pl.model.options import check_options


class Schedule(ABC):
    """When pruning events happen and which share of the weights is zero after each.

    An event at epoch e happens before the first batch of epoch e (epochs count from 0). A schedule of
    your own derives from this class and is named in YAML by its `class_path`.

    A schedule sees epochs and the target, no loss, and has no state in checkpoints: the callback keeps which
    event was the latest. `last_epoch` is asked before training; `is_due` before every batch until the epoch's
    event has happened, so that its answer must not change within an epoch; `sparsity_at` also for epoch -1.
    To react to a loss, replace `AlterMOMACallback.schedule` between epochs (guide `training.md`).
    """

    @property
    @abstractmethod
    def last_epoch(self) -> int:
        """Epoch of the last event, after which the target is reached."""

    @abstractmethod
    def is_due(self, epoch: int) -> bool:
        """Whether there is an event before the first batch of `epoch`."""

    @abstractmethod
    def sparsity_at(self, epoch: int, target: float) -> float:
        """Share of zeros during `epoch`: 0 before the first event, exactly `target` from the last on."""

    @property
    def rewinds_to(self) -> int | None:
        """Epoch to whose start later events bring weights and optimizers back; None to train on."""
        return None


class _Planned(Schedule):
    """The epochs of all events are known from the start."""

    @property
    @abstractmethod
    def _events(self) -> Sequence[int]:
        """Epochs of the events, in order."""

    def _curve(self, progress: float, target: float) -> float:
        """Sparsity at the given share of the events, in (0, 1); the first event already prunes.

        Here each event removes the same share of what remains.
        """
        return float(1 - (1 - target) ** progress)

    @property
    def last_epoch(self) -> int:
        return self._events[-1]

    def is_due(self, epoch: int) -> bool:
        return epoch in self._events

    def sparsity_at(self, epoch: int, target: float) -> float:
        past, number = bisect(self._events, epoch), len(self._events)
        if past == number:
            return target  # not by the curve, which would round
        return self._curve(past / number, target) if past else 0.0


@dataclass(frozen=True)
class OneShot(_Planned):
    """Everything at once.

    Args:
        epoch: When.
    """

    epoch: int = 0

    def __post_init__(self) -> None:
        check_options(self, epoch=0)

    @property
    def _events(self) -> Sequence[int]:
        return (self.epoch,)


@dataclass(frozen=True)
class _Gradual(_Planned):
    """Events at `start`, `start + every`, ... and at `end`."""

    start: int = 0
    end: int = 4
    every: int = 1

    def __post_init__(self) -> None:
        check_options(self, every=1)
        if not 0 <= self.start <= self.end:
            raise ValueError(
                f"{type(self).__name__}: 0 <= start <= end is needed, got start={self.start}, end={self.end}"
            )

    @property
    def _events(self) -> Sequence[int]:
        return (*range(self.start, self.end, self.every), self.end)


@dataclass(frozen=True)
class Linear(_Gradual):
    """Equal steps of sparsity.

    Args:
        start: Epoch of the first event.
        end: Epoch of the last event.
        every: Number of epochs from one event to the next.
    """

    def _curve(self, progress: float, target: float) -> float:
        return target * progress


@dataclass(frozen=True)
class Cubic(_Gradual):
    """Large steps first, small ones last: target * (1 - (1 - progress)^3), Zhu and Gupta 2017.

    Args:
        start: Epoch of the first event.
        end: Epoch of the last event.
        every: Number of epochs from one event to the next.
    """

    def _curve(self, progress: float, target: float) -> float:
        return float(target * (1 - (1 - progress) ** 3))


@dataclass(frozen=True)
class Exponential(_Gradual):
    """The same share of what remains at every event: density = (1 - target)^progress.

    Args:
        start: Epoch of the first event.
        end: Epoch of the last event.
        every: Number of epochs from one event to the next.
    """


@dataclass(frozen=True)
class Rewinding(_Planned):
    """Rounds of training from the same start, each with fewer weights: lottery tickets.

    Iterative magnitude pruning with rewinding (Frankle and Carbin 2019; Frankle et al. 2020), if the
    criterion is `Magnitude`. Every event removes the same share of what remains,
    1 - (1 - target)^(1 / rounds), judged by the weights as trained. Then parameters, buffers, optimizers
    and learning-rate schedulers go back to what they were at the start of `rewind_epoch`; only the
    masks are new, and the next round trains from there.

    The model that is given to fit counts as trained: it is the first to be pruned, before epoch
    `rewind_epoch`, and event k comes before epoch `rewind_epoch + k * epochs_per_round`. So that the
    last round is as long as the others, train for `rewind_epoch + rounds * epochs_per_round` epochs. The
    position in the learning-rate schedule goes back too: its length should be
    `rewind_epoch + epochs_per_round` epochs, one round and not the run.

    Args:
        rounds: Number of events, and of rounds of training that follow them.
        epochs_per_round: Epochs from one event to the next.
        rewind_epoch: To the start of which epoch the run goes back; 0 for what was given to fit.

    Raises:
        ValueError: If a value is too small.
    """

    rounds: int = 3
    epochs_per_round: int = 4
    rewind_epoch: int = 0

    def __post_init__(self) -> None:
        check_options(self, rounds=1, epochs_per_round=1, rewind_epoch=0)

    @property
    def rewinds_to(self) -> int:
        """The epoch to whose start each event goes back."""
        return self.rewind_epoch

    @property
    def _events(self) -> Sequence[int]:
        first, step = self.rewind_epoch, self.epochs_per_round
        return range(first, first + self.rounds * step, step)
