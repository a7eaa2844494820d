"""Criteria that need no data: the controls that anything else must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from altermoma_pl.model.distributed import sharded_like
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value of the weight."""

    uses_batches = False
    shardable = True
    for_channels = True

    def score(self, calibration: Calibration) -> Scores:
        """|theta| of every prunable weight."""
        return {name: weight.detach().abs() for name, weight in calibration.weights.items()}


@dataclass(frozen=True)
class Random(Criterion):
    """Independent draws from the standard normal distribution, repeatable by the calibration's seed."""

    uses_batches = False
    shardable = True
    for_channels = True

    def score(self, calibration: Calibration) -> Scores:
        """The same draws for the same seed, on any device."""
        generator = torch.Generator().manual_seed(calibration.seed)
        return {
            name: sharded_like(torch.randn(weight.shape, generator=generator), weight)
            for name, weight in calibration.weights.items()
        }
