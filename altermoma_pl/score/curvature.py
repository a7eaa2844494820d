"""Products of the Hessian of the loss with a vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.graph import upstream
from altermoma_pl.score.passes import Gradients, Weights


def hessian_product(
    calibration: Calibration, label: str, batch: Any, of: Weights, vector: Gradients, instead: str
) -> tuple[float, Gradients]:
    """The loss on a batch and H v by differentiating g v once more (Pearlmutter 1994).

    Args:
        calibration: The model and its loss.
        label: Names the batch in messages.
        batch: The batch.
        of: The parameters between which H is taken; those that g v does not reach are left out.
        vector: v, for each of these parameters.
        instead: Option to propose where an operation cannot be differentiated twice.

    Raises:
        TypeError, ValueError: As `Calibration.gradients`.
        RuntimeError: If an operation cannot be differentiated twice, or memory runs out.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
        loss, gradients = calibration.gradients(label, batch, of, create_graph=True)
        terms = [(g * vector[name]).sum() for name, g in gradients.items() if g.requires_grad]
        if not terms:  # the loss is linear in these parameters
            return loss, {}
        found = _differentiate(torch.stack(terms).sum(), list(of.values()), instead)
    return loss, {name: h for name, h in zip(of, found, strict=True) if h is not None}


def _differentiate(value: Tensor, of: list[Any], instead: str) -> tuple[Tensor | None, ...]:
    # `once_differentiable` leaves a node that raises, but none that leads to the parameters: autograd
    # would pass it over, and the result would lack a part.
    if any(node.name() == "torch::autograd::Error" for node in upstream([value.grad_fn])):
        raise RuntimeError(_not_twice("a function is marked with @once_differentiable", instead))
    try:
        return torch.autograd.grad(value, of, allow_unused=True)
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise RuntimeError(_not_twice(str(error), instead)) from error


def _not_twice(why: str, instead: str) -> str:
    return f"an operation of the model cannot be differentiated twice ({why}): use {instead}"
