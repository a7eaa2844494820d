"""Means over seeds with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import sem, t


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval, by Student's t.

    Args:
        mean: NaN if a value is not finite: a run that diverged has no place in a mean.
        half_width: Infinite for one seed, NaN with the mean.
        num_seeds: How many values there are.
    """

    mean: float
    half_width: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of independent values, at least one."""
        count = len(values)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, count)
        if count == 1:
            return cls(values[0], math.inf, count)
        # Not `ttest_1samp`'s interval: scipy warns where all values are equal.
        return cls(fmean(values), float(t.ppf(0.975, count - 1) * sem(values)), count)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    def text(self, digits: int = 3) -> str:
        """`0.567 ± 0.012`, or the mean alone where there is no interval."""
        mean = f"{self.mean:.{digits}f}"
        return f"{mean} ± {self.half_width:.{digits}f}" if math.isfinite(self.half_width) else mean

    def interval(self, digits: int = 3) -> str:
        """`+0.012 [+0.003, +0.021]`, for differences."""
        if math.isnan(self.mean):
            return "nan"
        mean = f"{self.mean:+.{digits}f}"
        if math.isinf(self.half_width):
            return mean
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of ours minus theirs, seed by seed: what the seeds have in common cancels."""
    return Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])
