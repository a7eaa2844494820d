"""Measure what models cost to run, one beside the other."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from altermoma_pl.export.costs.memory import peak_memory
from altermoma_pl.export.costs.quantities import Costs, Latency
from altermoma_pl.export.costs.report import CostReport
from altermoma_pl.export.costs.timing import in_turns
from altermoma_pl.granularity.channels import count_flops
from altermoma_pl.model.contexts import restored


def measure(
    models: Mapping[str, nn.Module],
    inputs: Mapping[int, tuple[Any, ...]],
    repeats: int = 20,
    warm_up: int = 3,
    threads: int | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> CostReport:
    """Measure models side by side, all in evaluation mode and on the same inputs.

    For each batch size the models take turns, in an order that is reversed every round, in inference
    mode. FLOPs and memory are those of the smallest batch.

    Args:
        models: Name -> model, all on one device; the first is the reference. They are left as they were,
            and so are random number generators and torch's thread count.
        inputs: Batch size -> positional arguments of a model.
        repeats: Timed runs of each model and batch size.
        warm_up: Runs before these.
        threads: Of torch on the CPU while measuring; None for as many as now.
        metrics: Model name -> metric -> value: what the models are worth, for the report.

    Raises:
        ValueError: If there is no model or no input, models are on several devices, a model refuses its
            inputs, a number is too small, or there are metrics of an unknown model.
    """
    metrics = metrics or {}
    _check(models, inputs, metrics)
    _check_at_least(repeats=(repeats, 1), warm_up=(warm_up, 0))
    device = _device(models)
    smallest = min(inputs)
    with ExitStack() as stack:
        num_threads = stack.enter_context(_threads(threads))
        for model in models.values():
            stack.enter_context(restored(model))
            model.eval()
        for name, model in models.items():
            for batch, example in inputs.items():
                _try(name, model, batch, example)
        latencies: dict[str, list[Latency]] = {name: [] for name in models}
        for batch, example in inputs.items():
            runs = {name: partial(model, *example) for name, model in models.items()}
            with torch.inference_mode():
                taken = in_turns(runs, repeats, warm_up, device)
            for name, seconds in taken.items():
                low, median, high = quartiles(seconds)
                own = Latency(batch, median, low, high, repeats, warm_up, num_threads, str(device))
                latencies[name].append(own)
        return CostReport(
            smallest,
            {
                name: _costs(model, inputs[smallest], device, tuple(latencies[name]), metrics.get(name, {}))
                for name, model in models.items()
            },
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; a single value is all three."""
    # Not those of `statistics`, which may differ by rounding where all values are the same.
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return low, median, high


def _costs(
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


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if wanted is not None:
        _check_at_least(threads=(wanted, 1))
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    found = {p.device for model in models.values() for p in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"models must be on one device to be compared, got {names}; move them with .to()")
    return found.pop() if found else torch.device("cpu")


def _check(models: Mapping[str, Any], inputs: Mapping[int, Any], metrics: Mapping[str, Any]) -> None:
    if not models:
        raise ValueError("no model to measure: give at least one, by name; the first is the reference")
    if not inputs:
        raise ValueError("no inputs: give at least one batch size and the model's arguments, {1: (images,)}")
    for batch, example in inputs.items():
        _check_at_least(**{"a batch size": (batch, 1)})
        if not isinstance(example, tuple):
            raise ValueError(
                f"inputs of batch size {batch} must be a tuple of arguments, got {type(example).__name__}; "
                "write (images,) for a single one"
            )
    unknown = [name for name in metrics if name not in models]
    if unknown:
        raise ValueError(f"metrics of unknown models {unknown}; there are {list(models)}")


def _check_at_least(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
