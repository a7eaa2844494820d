"""Schedules: at which epochs to prune, and how far. Frozen and stateless."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


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


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once.

    Args:
        epoch: When.
    """

    epoch: int = 0

    def __post_init__(self) -> None:
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


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
