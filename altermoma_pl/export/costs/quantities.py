"""What one model costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass.

    Args:
        batch: Samples in the batch.
        median: Over the repeats.
        low: Lower quartile.
        high: Upper quartile.
        repeats: How many runs were timed.
        warm_up: How many went before.
        threads: Of torch on the CPU.
        device: Where the model was.
    """

    batch: int
    median: float
    low: float
    high: float
    repeats: int
    warm_up: int
    threads: int
    device: str

    def __post_init__(self) -> None:
        check_counts(self, batch=1, repeats=1, warm_up=0, threads=1)
        for name in ("median", "low", "high"):
            _check_number(name, getattr(self, name))
        if not 0 <= self.low <= self.median <= self.high:
            raise ValueError(
                f"quartiles must be in order and not negative, got {self.low}, {self.median}, {self.high}"
            )
        if not isinstance(self.device, str):
            raise ValueError(f"device must be a string, got {self.device!r}")


@dataclass(frozen=True)
class Costs:
    """What one model costs, and what it is worth.

    Args:
        num_parameters: Elements of all parameters.
        num_nonzero: How many of them are not zero.
        flops: Of one forward pass, two for each multiply-add; None if they cannot be counted.
        uncounted: What did work that is not in `flops`, as `Flops.uncounted`.
        peak_memory: Most bytes alive at once beyond weights and inputs, as `costs.peak_memory`; None if
            it cannot be measured.
        latency: One entry for each batch size.
        file_bytes: Of the `state_dict` as torch.save writes it.
        compressed_bytes: Of that file after gzip, level 6.
        metrics: Name -> value, given by the caller.
    """

    num_parameters: int
    num_nonzero: int
    flops: int | None
    uncounted: tuple[str, ...]
    peak_memory: int | None
    latency: tuple[Latency, ...]
    file_bytes: int
    compressed_bytes: int
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        check_counts(self, num_parameters=0, num_nonzero=0, file_bytes=0, compressed_bytes=0)
        measured = [name for name in ("flops", "peak_memory") if getattr(self, name) is not None]
        check_counts(self, **dict.fromkeys(measured, 0))
        for operator in self.uncounted:
            if not isinstance(operator, str):
                raise ValueError(f"uncounted must be strings, got {operator!r}")
        for name, value in self.metrics.items():
            _check_number(f"metric {name!r}", value)

    def values(self) -> dict[str, float | None]:
        """Every number by its name, as "flops", "latency.1.median", "metrics.mIoU"; None if not finite."""
        counts = ("num_parameters", "num_nonzero", "flops", "peak_memory", "file_bytes", "compressed_bytes")
        return {
            **{name: getattr(self, name) for name in counts},
            **{
                f"latency.{own.batch}.{quartile}": getattr(own, quartile)
                for own in self.latency
                for quartile in ("median", "low", "high")
            },
            **{f"metrics.{n}": value if math.isfinite(value) else None for n, value in self.metrics.items()},
        }


def check_counts(owner: Any, **at_least: int) -> None:
    """Raise a ValueError where an attribute is no integer, or is below the least that it may be."""
    for name, least in at_least.items():
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
