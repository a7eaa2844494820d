"""Passes over the calibration batches: gradients, losses, and a little training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.model.contexts import seed_generators
from altermoma_pl.model.distributed import local, num_processes, sum_, together
from altermoma_pl.model.distributed import sums as sums_of_processes
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.finite import NonFiniteError

Gradients = dict[str, Tensor]
Weights = Mapping[str, nn.Parameter]
_CHUNK = 2**18

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
    """Mean loss and mean gradient (or mean absolute gradient) over probe batches of all processes.

    Args:
        calibration: The model and its batches.
        of: Parameters by name.
        count: Number of batches.
        phase: Told to whoever watches the progress.
        skip: Batches to pass over first.
        absolute: The absolute value of each batch's gradient goes into the mean. Where parameters are
            sharded a batch is one of each process, since no process has the gradients of its own batch.
        measure: What to measure on each batch instead of the gradient.
    """
    seed_generators(calibration.seed)
    sums, losses = accumulators(of), []
    with _together(calibration):
        batches = calibration.probes(count, phase, skip)
        for loss, gradients in calibration.finite(
            batches, lambda label, batch: (measure or calibration.derivatives)(label, batch, of)
        ):
            losses.append(loss)
            while gradients:  # let go of them: the next come before the names are bound anew
                name, gradient = gradients.popitem()
                _add_(sums[name], gradient, absolute)
    return _mean(losses), _means_(calibration, sums, len(losses))


@torch.no_grad()
def mean_loss(calibration: Calibration, count: int, phase: str) -> float:
    """Mean loss over probe batches of all processes."""
    seed_generators(calibration.seed)
    with _together(calibration):
        batches = calibration.probes(count, phase)
        losses = list(calibration.finite(batches, lambda *labelled: float(calibration.loss(*labelled))))
    return _mean(losses)


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

    def both(label: str, batch: Any) -> tuple[float, Gradients, float, Gradients]:
        _load_(parameters, before)
        first = calibration.derivatives(label, batch, of)
        _load_(parameters, after)
        return *first, *calibration.derivatives(label, batch, of)

    with _together(calibration):
        batches = calibration.probes(count, f"{phase}, reactivated")
        for loss, gradients, later_loss, later in calibration.finite(batches, both):
            losses.append(loss)
            later_losses.append(later_loss)
            for name in gradients.keys() | later.keys():
                zero = torch.zeros_like(of[name])
                sums[name] += (gradients.get(name, zero) - later.get(name, zero)).abs()
    change = _means_(calibration, sums, len(losses))
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
    stepper = _stepper(list(trained.values()), optimizer, learning_rate)
    for gradients in training_gradients(
        calibration, trained, num_steps, f"{modality} deactivated, reactivation"
    ):
        for name in list(gradients):
            gradient = gradients.pop(name)
            if calibration.masks is not None and name in calibration.masks:
                gradient = gradient * calibration.masks[name]
            trained[name].grad = gradient
        if gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), gradient_clip)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    stepper.state.clear()  # an optimizer is part of a cycle: its moments would stay until those are collected


def _stepper(trained: list[nn.Parameter], optimizer: str, learning_rate: float) -> torch.optim.Optimizer:
    if optimizer == "sgd":
        return torch.optim.SGD(trained, lr=learning_rate)
    # Fused where it exists: the other kinds of Adam need room for two more copies of a tensor, or of all.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.Adam(trained, lr=learning_rate, fused=fused)


def training_gradients(calibration: Calibration, of: Weights, count: int, phase: str) -> Iterator[Gradients]:
    """Gradients on up to `count` training batches; those of one step are the mean over all processes."""
    steps = calibration.finite(
        calibration.trainings(count, phase),
        lambda label, batch: calibration.gradients(label, batch, of)[1],
        lockstep=num_processes() > 1,
    )
    return (mean_over_processes(calibration, gradients, of) for gradients in steps)


def mean_over_processes(calibration: Calibration, gradients: Gradients, of: Weights) -> Gradients:
    """The mean over the batches of all processes; those of sharded parameters are that already."""
    if num_processes() == 1 or calibration.sharded:
        return gradients
    mean = {}
    for name, parameter in of.items():  # of all alike, also where the batch of one does not reach it
        gradient = gradients.get(name)
        copy = torch.zeros_like(parameter.detach()) if gradient is None else gradient.detach().clone()
        mean[name] = sum_(copy.contiguous()).div_(num_processes())
    return mean


def accumulators(of: Weights) -> Gradients:
    """Zeros like the parameters, in float32 at least."""
    return {name: torch.zeros_like(at_least_float32(w.detach())) for name, w in of.items()}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same, of a type in which sums and squares keep their precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _add_(total: Tensor, value: Tensor, absolute: bool) -> None:
    """Add in place; absolute values chunk by chunk, since a large temporary costs more than the sum."""
    if not absolute:
        total += value
        return
    total, value = local(total), local(value)
    if value.numel() <= _CHUNK:
        total += value.abs()
        return
    rows = max(1, _CHUNK * len(value) // value.numel())
    for part, more in zip(torch.split(total, rows), torch.split(value, rows), strict=True):
        part += more.abs()


@contextmanager
def _together(calibration: Calibration) -> Iterator[None]:
    """An error in one process is one in all, where they do not wait for each other within a pass."""
    with nullcontext() if calibration.lockstep else together(NonFiniteError):
        yield


def _mean(values: list[float]) -> float:
    total, count = sums_of_processes([sum(values), len(values)])
    if count == 0:
        raise NonFiniteError("no probe batch is left: the loss or the gradient of each was not finite")
    return total / count


def _means_(calibration: Calibration, sums: Gradients, num_batches: int) -> Gradients:
    """Divide sums over batches by their number, in place; both are those of all processes."""
    if not calibration.sharded:
        num_batches = int(sums_of_processes([num_batches])[0])
    return {name: sum_(total).div_(num_batches) for name, total in sums.items()}


def _copy(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _load_(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
