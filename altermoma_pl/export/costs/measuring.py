"""Measure what models cost to run, one beside the other."""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from altermoma_pl.export.costs.memory import peak_memory
from altermoma_pl.export.costs.report import CostReport, Costs, Latency
from altermoma_pl.export.costs.timing import in_turns, quartiles
from altermoma_pl.granularity.channels.flops import count_flops
from altermoma_pl.model.contexts import restored

_WARM_UP = 3  # runs before those that are timed


def measure(
    models: Mapping[str, nn.Module],
    inputs: Mapping[int, tuple[Any, ...]],
    repeats: int = 20,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> CostReport:
    """Measure models side by side, all in evaluation mode and on the same inputs.

    For each batch size the models take turns, in an order that is reversed every round, in inference
    mode. FLOPs and memory are those of the smallest batch.

    Args:
        models: Name -> model, all on one device; the first is the reference. They are left as they were,
            and so are random number generators.
        inputs: Batch size -> positional arguments of a model.
        repeats: Timed runs of each model and batch size.
        metrics: Model name -> metric -> value: what the models are worth, for the report.

    Raises:
        ValueError: If there is no model or no input, models are on several devices, a model refuses its
            inputs, repeats are less than one, or there are metrics of an unknown model.
    """
    metrics = metrics or {}
    _check_measurable(models, inputs, repeats, metrics)
    device = _common_device(models)
    smallest = min(inputs)
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(restored(model))
            model.eval()
            for batch, example in inputs.items():
                _try(name, model, batch, example)
        seconds = {}
        for batch, example in inputs.items():
            runs = {name: partial(model, *example) for name, model in models.items()}
            with torch.inference_mode():
                seconds[batch] = in_turns(runs, repeats, _WARM_UP, device)
        costs = {}
        for name, model in models.items():
            latency = tuple(_latency(batch, taken[name], device) for batch, taken in seconds.items())
            costs[name] = _costs_of(model, inputs[smallest], device, latency, metrics.get(name, {}))
        return CostReport(smallest, costs)


def _latency(batch: int, seconds: list[float], device: torch.device) -> Latency:
    low, median, high = quartiles(seconds)
    threads = torch.get_num_threads()
    return Latency(batch, median, low, high, len(seconds), _WARM_UP, threads, str(device))


def _costs_of(
    model: nn.Module,
    inputs: tuple[Any, ...],
    device: torch.device,
    latency: tuple[Latency, ...],
    metrics: Mapping[str, float],
) -> Costs:
    flops = count_flops(model, lambda module: module(*inputs))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return Costs(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_nonzero=sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
        flops=flops.total,
        uncounted=flops.uncounted,
        peak_memory=peak_memory(model, inputs, device),
        latency=latency,
        file_bytes=file.getbuffer().nbytes,
        compressed_bytes=len(gzip.compress(file.getbuffer(), compresslevel=6)),
        metrics=dict(metrics),
    )


def _try(name: str, model: nn.Module, batch: int, inputs: tuple[Any, ...]) -> None:
    """One pass before all else: what modules make in their first pass is then no inference tensor."""
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        raise ValueError(
            f"model {name!r} refuses the inputs of batch size {batch}: {type(error).__name__}: {error}. "
            "Give a tuple of positional arguments, on the device of the model"
        ) from error


def _common_device(models: Mapping[str, nn.Module]) -> torch.device:
    found = {p.device for model in models.values() for p in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"models must be on one device to be compared, got {names}; move them with .to()")
    return found.pop() if found else torch.device("cpu")


def _check_measurable(
    models: Mapping[str, Any], inputs: Mapping[int, Any], repeats: int, metrics: Mapping[str, Any]
) -> None:
    if not models:
        raise ValueError("no model to measure: give at least one, by name; the first is the reference")
    if not inputs:
        raise ValueError("no inputs: give at least one batch size and the model's arguments, {1: (images,)}")
    for batch, example in inputs.items():
        if not isinstance(example, tuple):
            raise ValueError(
                f"inputs of batch size {batch} must be a tuple of arguments, got {type(example).__name__}; "
                "write (images,) for a single one"
            )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    unknown = [name for name in metrics if name not in models]
    if unknown:
        raise ValueError(f"metrics of unknown models {unknown}; there are {list(models)}")
