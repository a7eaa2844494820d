"""Wanda: weights times the size of what comes in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.distributed import sum_
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.passes import accumulators, mean_loss

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Wanda(Criterion):
    """|theta_ij| * |X_j|: the weight times the norm of its input over all samples and positions.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    Scores are meant to compete within an output row: use the scope "row". All inputs are those of the
    model as it is, where the paper prunes block after block. A layer that is never called as a module
    scores 0; so does the output projection inside `nn.MultiheadAttention`, which calls it by itself.

    Args:
        num_probe_batches: Held-out batches whose inputs are measured.

    Raises:
        ValueError: If `num_probe_batches` is less than 1.
    """

    num_probe_batches: int = 64

    def __post_init__(self) -> None:
        check_options(self, num_probe_batches=1)

    def score(self, calibration: Calibration) -> Scores:
        """|theta| times the norm of the input, of every prunable weight.

        Raises:
            ValueError: If a prunable weight is not that of a linear or convolution layer of torch.
        """
        model, weights = calibration.model, calibration.weights
        owners = _owners(calibration)
        squares = accumulators(weights)
        with noise_free(model), restored(model):  # without the hooks
            for name, layers in owners.items():
                for layer in layers:
                    layer.register_forward_hook(_adder(squares[name]), with_kwargs=True)
            mean_loss(calibration, self.num_probe_batches, "inputs")
        return {name: weights[name].detach().abs() * sum_(total).sqrt() for name, total in squares.items()}


def _owners(calibration: Calibration) -> dict[str, list[nn.Module]]:
    """Prunable parameter name -> the layers whose weight it is, several if it is tied."""
    owners: dict[str, list[nn.Module]] = {}
    for name, weight in calibration.weights.items():
        owners[name] = [
            module
            for module in calibration.model.modules()
            if isinstance(module, _LAYERS) and module.weight is weight
        ]
        if not owners[name]:
            raise ValueError(
                f"Wanda scores weights of linear and convolution layers of torch, {name!r} is none: "
                f"exclude it by the pattern '!{name}' in `prunable`, or use another criterion"
            )
    return owners


def _adder(squares: Tensor) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        x, *rest = args or (kwargs["input"],)
        squares.add_(_summed_squares(layer, x, rest, squares.dtype))

    return hook


def _summed_squares(layer: nn.Module, x: Tensor, rest: list[Any], dtype: torch.dtype) -> Tensor:
    """The sum of x_j^2 over samples and positions, in the shape of the layer's weight.

    The gradient of the summed output with respect to weight ij is the sum of the inputs x_j, whatever
    the layer's stride, padding, dilation and groups; here of the squared inputs.
    """
    weight = nn.Parameter(torch.zeros(layer.get_parameter("weight").shape, dtype=dtype, device=x.device))
    twin = copy.copy(layer)
    twin._parameters = {"weight": weight, "bias": None}
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        output = twin.forward(x.detach().to(dtype).square(), *rest)  # forward: without hooks
        return torch.autograd.grad(output.sum(), weight)[0]
