"""Passes over the calibration batches: losses, gradients and their means."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from altermoma_pl.model.contexts import seed_generators
from altermoma_pl.model.distributed import all_agree, local, num_processes, reshard_, sum_, sums, together
from altermoma_pl.score.calibration import Calibration, Gradients, LossAndGradients, Weights, known_length

Labelled = tuple[str, Any]
"""A batch behind the words that name it in messages."""

Measure = Callable[[str, Any], LossAndGradients]
"""From these two, the loss on the batch and its gradients, or what is to take their place."""

_PART = 2**18


class NonFiniteError(ValueError):
    """The loss of a batch, or a gradient of it, is infinite or not a number."""


def mean_gradients(
    calibration: Calibration,
    of: Weights,
    count: int,
    phase: str,
    skip: int = 0,
    absolute: bool = False,
    measure: Measure | None = None,
) -> LossAndGradients:
    """Mean loss and mean gradient (or mean absolute gradient) over probe batches of all processes.

    Args:
        calibration: The model and its batches.
        of: What is scored, `calibration.weights` or some of them.
        count: Number of batches.
        phase: Told to whoever watches the progress.
        skip: Batches to pass over first.
        absolute: The absolute value of each batch's gradient goes into the mean. Where parameters are
            sharded a batch is one of each process, since no process has the gradients of its own batch.
        measure: What to measure on each batch instead of the gradient.
    """
    measure = measure or partial(batch_derivatives, calibration, scored=of)
    seed_generators(calibration.seed)
    totals, losses = accumulators(of), []
    with _failing_together(calibration):
        for loss, gradients in measured(calibration, "probe", count, phase, measure, skip):
            losses.append(loss)
            while gradients:  # let go of them: the next come before the names are bound anew
                name, gradient = gradients.popitem()
                _add_(totals[name], gradient, absolute)
    loss, num_batches = _mean(losses)
    if calibration.sharded:  # then a batch is one of each process
        num_batches = len(losses)
    return loss, {name: sum_(total).div_(num_batches) for name, total in totals.items()}


@torch.no_grad()
def mean_loss(calibration: Calibration, count: int, phase: str) -> float:
    """Mean loss over probe batches of all processes."""
    seed_generators(calibration.seed)
    measure = partial(batch_loss, calibration)
    with _failing_together(calibration):
        losses = [float(loss) for loss in measured(calibration, "probe", count, phase, measure)]
    return _mean(losses)[0]


def measured(
    calibration: Calibration,
    kind: Literal["probe", "training"],
    count: int,
    phase: str,
    measure: Callable[[str, Any], Any] = lambda *labelled: labelled,
    skip: int = 0,
) -> Iterator[Any]:
    """What `measure` gives for up to `count` batches, after the first `skip` of them.

    Of probe batches each process takes its share of the count; a step of training takes a batch of each.
    A batch for which `measure` raises a `NonFiniteError` is an error or left out, as the calibration says.
    """
    batches = calibration.training_batches
    if kind == "probe":
        batches = calibration.probe_batches
        count, skip = (-(-number // num_processes()) for number in (count, skip))
    lockstep = calibration.lockstep or (kind == "training" and num_processes() > 1)
    agreed: Callable[[bool], bool] = all_agree if lockstep else bool
    length = known_length(batches)
    total = None if length is None else min(count, max(0, length - skip))
    done, own = 0, enumerate(itertools.islice(batches, skip, skip + count), start=skip)
    while True:
        index, batch = next(own, (-1, None))
        if not agreed(index >= 0):
            break
        calibration.progress(phase, done, total)
        label, result, error = f"{kind} batch {index}", None, None
        try:
            result = measure(label, batch)
        except NonFiniteError as found:
            error = found
        if agreed(error is None):
            yield result
        elif calibration.on_nonfinite == "skip":
            calibration.num_skipped += 1
        else:
            raise error or NonFiniteError(f"{label} of another process is not finite: see its message")
        done += 1
    calibration.progress(phase, done, done)
    if done == 0 and (lockstep or num_processes() == 1):
        after = f" after the first {skip}" if skip else ""
        raise ValueError(f"the {kind} loader gives no batch{after}: at least one is needed to score weights")
    if done < count:
        message = f"{count} {kind} batches were asked for, the loader has {done}: scoring with those"
        warnings.warn(message, stacklevel=2)


def batch_loss(calibration: Calibration, label: str, batch: Any, check: bool = True) -> Tensor:
    """The loss on a batch, a scalar; the check is whether it is finite."""
    loss = calibration.loss_fn(calibration.model, batch)
    if not torch.is_grad_enabled():
        reshard_(calibration.model)
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of {label} must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the loss of {label} must be a scalar, got shape {tuple(loss.shape)}")
    if check:
        _check_numbers(label, loss, {})
    return loss.reshape(())


def batch_gradients(
    calibration: Calibration, label: str, batch: Any, of: Weights, create_graph: bool = False
) -> LossAndGradients:
    """The loss on a batch and its gradients; parameters that it does not reach are left out.

    `.grad` is not touched and no hook on gradient accumulation fires, unless parameters are sharded:
    then gradients are those of the mean loss over all processes. With `create_graph` the gradients
    can be differentiated.
    """
    # In lockstep it is checked after the backward pass only, in which all processes take part.
    loss = batch_loss(calibration, label, batch, check=not calibration.lockstep)
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of {label} has no gradient: it is detached, computed without gradients, "
            f"or depends on no trainable parameter"
        )
    if calibration.sharded:
        found = _backward(calibration, loss, of)
    else:
        found = torch.autograd.grad(loss, list(of.values()), create_graph=create_graph, allow_unused=True)
    gradients = {name: g for name, g in zip(of, found, strict=True) if g is not None}
    _check_numbers(label, loss, gradients)
    return float(loss.detach()), gradients


def batch_derivatives(calibration: Calibration, label: str, batch: Any, scored: Weights) -> LossAndGradients:
    """The loss on a batch and its derivatives by what is scored, `calibration.weights` or some of them."""
    return calibration.derivatives(partial(batch_gradients, calibration, label, batch), scored)


def _backward(calibration: Calibration, loss: Tensor, of: Weights) -> tuple[Tensor | None, ...]:
    """Gradients as `fully_shard` makes them: in the backward pass itself, the mean over processes."""
    saved = [(parameter, parameter.grad) for parameter in calibration.leaves]
    for parameter, _ in saved:
        parameter.grad = None
    try:
        loss.backward()  # type: ignore[no-untyped-call]
        return tuple(parameter.grad for parameter in of.values())
    finally:
        for parameter, gradient in saved:
            parameter.grad = gradient


def _check_numbers(label: str, loss: Tensor, gradients: Gradients) -> None:
    advice = "on_nonfinite='skip' leaves such batches out"
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of {label} is {loss.item()}: check the batch, or lower the learning rate "
            f"of the criterion if it happened after steps of training; {advice}"
        )
    # One reading and one transfer; a sum may overflow, hence the second look.
    totals = [local(g).detach().sum() for g in gradients.values()]
    if not totals or torch.isfinite(torch.stack(totals)).all():
        return
    for name, gradient in gradients.items():
        if not torch.isfinite(local(gradient)).all():
            raise NonFiniteError(f"the gradient of {name!r} on {label} is not finite; {advice}")


def mean_over_processes(calibration: Calibration, gradients: Gradients, of: Weights) -> Gradients:
    """The mean over the batches of all processes; those of sharded parameters are that already."""
    if num_processes() == 1 or calibration.sharded:
        return gradients
    mean = {}
    for name, parameter in of.items():  # of all alike, also where the batch of one does not reach it
        own = gradients[name].detach() if name in gradients else torch.zeros_like(parameter.detach())
        mean[name] = sum_(own.clone(memory_format=torch.contiguous_format)).div_(num_processes())
    return mean


def without_pruned(calibration: Calibration, name: str, value: Tensor) -> Tensor:
    """The value, such as a gradient, with zeros where the parameter is pruned."""
    if calibration.masks is None or name not in calibration.masks:
        return value
    return value.masked_fill(~calibration.masks[name].to(value.device), 0)


def accumulators(of: Weights) -> Gradients:
    """Zeros like the parameters, in float32 at least."""
    return {name: torch.zeros_like(at_least_float32(w.detach())) for name, w in of.items()}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The same, of a type in which sums and squares keep their precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _add_(total: Tensor, value: Tensor, absolute: bool) -> None:
    if not absolute:
        total += value
        return
    # Part by part: a large temporary costs more than the sum.
    total, value = torch.atleast_1d([local(total), local(value)])  # type: ignore[no-untyped-call]
    parts = 1 + value.numel() // _PART
    for part, more in zip(total.chunk(parts), value.chunk(parts), strict=True):
        part += more.abs()


def _failing_together(calibration: Calibration) -> AbstractContextManager[None]:
    """An error in one process is one in all, where they do not wait for each other within a pass."""
    return nullcontext() if calibration.lockstep else together(NonFiniteError)


def _mean(losses: list[float]) -> tuple[float, int]:
    """The mean loss over all processes, and the number of their batches."""
    total, count = sums([sum(losses), len(losses)])
    if count == 0:
        raise NonFiniteError("no probe batch is left: the loss or the gradient of each was not finite")
    return total / count, int(count)
