"""Criteria from first-order gradients of the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.passes import Gradients, Weights, at_least_float32, mean_gradients


@dataclass(frozen=True)
class SNIP(Criterion):
    """Connection sensitivity |theta * mean g|: the absolute value is taken after the mean over batches.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.
    Unlike there the weights are trained ones, so g is small in the mean and many batches are needed.
    Norm layers use their running statistics: with those of the batch, the products of a filter cancel.

    Args:
        num_probe_batches: Held-out batches for gradients.

    Raises:
        ValueError: If `num_probe_batches` is less than 1.
    """

    num_probe_batches: int = 64

    shardable = True
    for_channels = True

    def __post_init__(self) -> None:
        check_options(self, num_probe_batches=1)

    def score(self, calibration: Calibration) -> Scores:
        """|theta * mean g| of every prunable weight."""
        weights = calibration.weights
        with noise_free(calibration.model), restored(calibration.model):
            _, gradients = mean_gradients(calibration, weights, self.num_probe_batches, "gradients")
            return {name: (weights[name].detach() * g).abs() for name, g in gradients.items()}


@dataclass(frozen=True)
class Taylor(Criterion):
    """Squared first-order change of the loss, mean (theta * g)^2: squared per batch, then averaged.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8, of
    single weights. It depends on the batch size, because g is a mean over the batch.

    Args:
        num_probe_batches: Held-out batches for gradients.

    Raises:
        ValueError: If `num_probe_batches` is less than 1.
    """

    num_probe_batches: int = 64

    shardable = True
    for_channels = True

    def __post_init__(self) -> None:
        check_options(self, num_probe_batches=1)

    def score(self, calibration: Calibration) -> Scores:
        """The mean of (theta * g)^2 of every prunable weight."""

        def squares(label: str, batch: Any, of: Weights) -> tuple[float, Gradients]:
            loss, gradients = calibration.derivatives(label, batch, of)
            return loss, {n: (of[n].detach() * at_least_float32(g)).square() for n, g in gradients.items()}

        with noise_free(calibration.model), restored(calibration.model):
            return mean_gradients(
                calibration, calibration.weights, self.num_probe_batches, "gradients", measure=squares
            )[1]
