"""Passes over the calibration batches: gradients, losses, and a little training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.contexts import seed_generators
from altermoma_pl.criteria.base import Calibration

Gradients = dict[str, Tensor]
Weights = Mapping[str, nn.Parameter]
Measure = Callable[[str, Any, Weights], tuple[float, Gradients]]
"""Label, batch and parameters -> the loss on the batch and what is measured of each parameter."""


def mean_gradients(
    calibration: Calibration,
    of: Weights,
    count: int,
    phase: str,
    skip: int = 0,
    absolute: bool = False,
    measure: Measure | None = None,
) -> tuple[float, Gradients]:
    """Mean loss and mean gradient (or mean absolute gradient) over probe batches.

    Args:
        calibration: The model and its batches.
        of: Parameters by name.
        count: Number of batches.
        phase: Told to whoever watches the progress.
        skip: Batches to pass over first.
        absolute: The absolute value of each batch's gradient goes into the mean.
        measure: What to measure on each batch instead of the gradient.
    """
    seed_generators(calibration.seed)
    sums, losses = accumulators(of), []
    for label, batch in calibration.probes(count, phase, skip):
        loss, gradients = (measure or calibration.gradients)(label, batch, of)
        losses.append(loss)
        for name, gradient in gradients.items():
            sums[name] += gradient.abs() if absolute else gradient
    return _mean(losses), {name: total / len(losses) for name, total in sums.items()}


@torch.no_grad()
def mean_loss(calibration: Calibration, count: int, phase: str) -> float:
    """Mean loss over probe batches."""
    seed_generators(calibration.seed)
    return _mean([float(calibration.loss(*labelled)) for labelled in calibration.probes(count, phase)])


def mean_change(
    calibration: Calibration,
    of: Weights,
    count: int,
    phase: str,
    train: Callable[[], None],
) -> tuple[float, float, Gradients]:
    """Mean losses before and after `train()`, and the mean of |g - g'| with g and g' of one batch."""
    parameters = list(calibration.model.parameters())
    before = _copy(parameters)
    train()
    after = _copy(parameters)
    seed_generators(calibration.seed)
    sums, losses, later_losses = accumulators(of), [], []
    for label, batch in calibration.probes(count, f"{phase}, reactivated"):
        _load_(parameters, before)
        loss, gradients = calibration.gradients(label, batch, of)
        _load_(parameters, after)
        later_loss, later = calibration.gradients(label, batch, of)
        losses.append(loss)
        later_losses.append(later_loss)
        for name in gradients.keys() | later.keys():
            zero = torch.zeros_like(of[name])
            sums[name] += (gradients.get(name, zero) - later.get(name, zero)).abs()
    change = {name: total / len(losses) for name, total in sums.items()}
    return _mean(losses), _mean(later_losses), change


def reactivate(
    calibration: Calibration,
    modality: str,
    num_steps: int,
    optimizer: str,
    learning_rate: float,
    gradient_clip: float | None,
) -> None:
    """Train everything but the deactivated modality, one step for each training batch, in place.

    The deactivated parameters are not given to the optimizer: Adam and weight decay would move them
    although their gradient is zero. Pruned weights stay zero.
    """
    if num_steps == 0:
        return
    seed_generators(calibration.seed)
    inactive = set(calibration.groups[modality])
    trained = {
        name: parameter
        for name, parameter in calibration.model.named_parameters()
        if parameter.requires_grad and name not in inactive
    }
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    stepper = kind(trained.values(), lr=learning_rate)
    for label, batch in calibration.trainings(num_steps, f"{modality} deactivated, reactivation"):
        _, gradients = calibration.gradients(label, batch, trained)
        for name, gradient in gradients.items():
            if calibration.masks is not None and name in calibration.masks:
                gradient = gradient * calibration.masks[name]
            trained[name].grad = gradient
        if gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), gradient_clip)
        stepper.step()
        stepper.zero_grad(set_to_none=True)


def accumulators(of: Weights) -> Gradients:
    """Zeros like the parameters, in float32 at least."""
    return {name: torch.zeros_like(at_least_float32(w.detach())) for name, w in of.items()}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same, of a type in which sums and squares keep their precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _copy(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _load_(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
