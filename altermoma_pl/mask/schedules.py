"""Schedules: at which epochs to prune, and how far. Frozen and stateless."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from altermoma_pl.model.options import check_types


class Schedule(ABC):
    """When pruning events happen and which share of the weights is zero after each.

    An event at epoch e happens before the first batch of epoch e (epochs count from 0). A schedule of
    your own derives from this class and is named in YAML by its `class_path`.
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


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once.

    Args:
        epoch: When.
    """

    epoch: int = 0

    def __post_init__(self) -> None:
        check_types(self, "OneShot: ")
        _check(self.epoch >= 0, f"OneShot: epoch must be at least 0, got {self.epoch}")

    @property
    def last_epoch(self) -> int:
        """Epoch of the only event."""
        return self.epoch

    def is_due(self, epoch: int) -> bool:
        """Whether this is the epoch."""
        return epoch == self.epoch

    def sparsity_at(self, epoch: int, target: float) -> float:
        """0 before, `target` after."""
        return target if epoch >= self.epoch else 0.0


@dataclass(frozen=True)
class _Gradual(Schedule):
    """Events at `start`, `start + every`, ... and at `end`.

    Args:
        start: Epoch of the first event.
        end: Epoch of the last event.
        every: Number of epochs from one event to the next.

    Raises:
        ValueError: If not 0 <= start <= end or every < 1.
    """

    start: int = 0
    end: int = 4
    every: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_types(self, f"{name}: ")
        _check(
            0 <= self.start <= self.end,
            f"{name}: 0 <= start <= end is needed, got start={self.start}, end={self.end}",
        )
        _check(self.every >= 1, f"{name}: every must be at least 1 epoch, got {self.every}")

    @property
    def last_epoch(self) -> int:
        """Epoch of the last event."""
        return self.end

    def is_due(self, epoch: int) -> bool:
        """Whether `epoch` is `start`, a multiple of `every` after it, or `end`."""
        inside = self.start <= epoch <= self.end
        return inside and ((epoch - self.start) % self.every == 0 or epoch == self.end)

    def sparsity_at(self, epoch: int, target: float) -> float:
        """The sparsity of the latest event; the first event already prunes."""
        if epoch >= self.end:
            return target
        if epoch < self.start:
            return 0.0
        num_events = -(-(self.end - self.start) // self.every) + 1
        return self._curve(((epoch - self.start) // self.every + 1) / num_events, target)

    @abstractmethod
    def _curve(self, progress: float, target: float) -> float:
        """Sparsity at the given share of the events, in (0, 1)."""


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

    def _curve(self, progress: float, target: float) -> float:
        return float(1 - (1 - target) ** progress)


@dataclass(frozen=True)
class Rewinding(Schedule):
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
        check_types(self, "Rewinding: ")
        for name, least in (("rounds", 1), ("epochs_per_round", 1), ("rewind_epoch", 0)):
            value = getattr(self, name)
            _check(value >= least, f"Rewinding: {name} must be at least {least}, got {value}")

    @property
    def last_epoch(self) -> int:
        """Epoch of the last event; a round of training follows it."""
        return self.rewind_epoch + (self.rounds - 1) * self.epochs_per_round

    @property
    def rewinds_to(self) -> int:
        """The epoch to whose start each event goes back."""
        return self.rewind_epoch

    def is_due(self, epoch: int) -> bool:
        """Whether a round begins with `epoch`."""
        inside = self.rewind_epoch <= epoch <= self.last_epoch
        return inside and (epoch - self.rewind_epoch) % self.epochs_per_round == 0

    def sparsity_at(self, epoch: int, target: float) -> float:
        """The sparsity of the round: 1 - (1 - target)^(round / rounds), with rounds counted from 1."""
        if epoch >= self.last_epoch:
            return target
        if epoch < self.rewind_epoch:
            return 0.0
        number = (epoch - self.rewind_epoch) // self.epochs_per_round + 1
        return float(1 - (1 - target) ** (number / self.rounds))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
