"""Criteria of one formula: from the weight alone, its gradient or its input."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.distributed import sharded_like, sum_
from altermoma_pl.score.calibration import Calibration, LossAndGradients
from altermoma_pl.score.criterion import Criterion, Probing, Scores
from altermoma_pl.score.passes import (
    accumulators,
    at_least_float32,
    batch_derivatives,
    mean_gradients,
    mean_loss,
)


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


@dataclass(frozen=True)
class SNIP(Probing):
    """Connection sensitivity |theta * mean g|: the absolute value is taken after the mean over batches.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.
    Unlike there the weights are trained ones, so g is small in the mean and many batches are needed.
    Norm layers use their running statistics: with those of the batch, the products of a filter cancel.
    """

    shardable = True
    for_channels = True

    def score(self, calibration: Calibration) -> Scores:
        """|theta * mean g| of every prunable weight."""
        weights = calibration.weights
        with noise_free(calibration.model), restored(calibration.model):
            _, gradients = mean_gradients(calibration, weights, self.num_probe_batches, "gradients")
            return {name: (weights[name].detach() * g).abs() for name, g in gradients.items()}


@dataclass(frozen=True)
class Taylor(Probing):
    """Squared first-order change of the loss, mean (theta * g)^2: squared per batch, then averaged.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8, of
    single weights. It depends on the batch size, because g is a mean over the batch.
    """

    shardable = True
    for_channels = True

    def score(self, calibration: Calibration) -> Scores:
        """The mean of (theta * g)^2 of every prunable weight."""
        of, count = calibration.weights, self.num_probe_batches

        def squares(label: str, batch: Any) -> LossAndGradients:
            loss, gradients = batch_derivatives(calibration, label, batch, of)
            return loss, {n: (of[n].detach() * at_least_float32(g)).square() for n, g in gradients.items()}

        with noise_free(calibration.model), restored(calibration.model):
            return mean_gradients(calibration, of, count, "gradients", measure=squares)[1]


@dataclass(frozen=True)
class Wanda(Probing):
    """|theta_ij| * |X_j|: the weight times the norm of its input over all samples and positions.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    Scores are meant to compete within an output row: use the scope "row". All inputs are those of the
    model as it is, where the paper prunes block after block. A layer that is never called as a module
    scores 0; so does the output projection inside `nn.MultiheadAttention`, which calls it by itself.
    """

    def score(self, calibration: Calibration) -> Scores:
        """|theta| times the norm of the input, of every prunable weight.

        Raises:
            ValueError: If a prunable weight is not that of a linear or convolution layer of torch.
        """
        model, weights = calibration.model, calibration.weights
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        layers = [module for module in model.modules() if isinstance(module, kinds)]
        squares = accumulators(weights)
        with noise_free(model), restored(model):  # without the hooks
            for name, weight in weights.items():
                owners = [layer for layer in layers if layer.weight is weight]  # several if it is tied
                if not owners:
                    raise ValueError(
                        f"Wanda scores weights of linear and convolution layers of torch, {name!r} is none: "
                        f"exclude it by the pattern '!{name}' in `prunable`, or use another criterion"
                    )
                for layer in owners:
                    layer.register_forward_hook(partial(_add_squares_, squares[name]), with_kwargs=True)
            mean_loss(calibration, self.num_probe_batches, "inputs")
        return {name: weights[name].detach().abs() * sum_(total).sqrt() for name, total in squares.items()}


def _add_squares_(
    squares: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor
) -> None:
    """Add the sum of x_j^2 over samples and positions, in the shape of the layer's weight.

    The gradient of the summed output with respect to weight ij is the sum of the inputs x_j, whatever
    the layer's stride, padding, dilation and groups; here of the squared inputs.
    """
    x, *rest = args or (kwargs["input"],)
    weight = nn.Parameter(torch.zeros(squares.shape, dtype=squares.dtype, device=x.device))
    twin = copy.copy(layer)
    twin._parameters = {"weight": weight, "bias": None}
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        output = twin.forward(x.detach().to(squares.dtype).square(), *rest)  # forward: without hooks
        squares.add_(torch.autograd.grad(output.sum(), weight)[0])
