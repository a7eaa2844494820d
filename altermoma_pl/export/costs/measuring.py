"""Measure what models cost to run, one beside the other: size, FLOPs, memory and time.

What is timed takes turns: whatever else the machine does meets all of it alike.
"""

from __future__ import annotations

import gzip
import io
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from altermoma_pl.export.costs.report import CostReport, Costs, Latency
from altermoma_pl.granularity.channels.flops import count_flops, layers_divided
from altermoma_pl.model.contexts import generators_restored, modes_restored, restored

_WARM_UP = 3  # runs before those that are timed
_ONNX_WARM_UP = 5
_ONNX_ROUNDS = 3


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
    device = _checked_device(models, inputs, repeats, metrics)
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(restored(model))
            model.eval()
            for batch, example in inputs.items():
                try:  # before all else: what modules make in their first pass is then no inference tensor
                    with torch.no_grad():
                        model(*example)
                except Exception as error:
                    raise ValueError(
                        f"model {name!r} refuses the inputs of batch size {batch}: {type(error).__name__}: "
                        f"{error}. Give a tuple of positional arguments, on the device of the model"
                    ) from error
        latencies: dict[str, list[Latency]] = {name: [] for name in models}
        for batch, example in inputs.items():
            runs = {name: partial(model, *example) for name, model in models.items()}
            with torch.inference_mode():
                seconds = in_turns(runs, repeats, _WARM_UP, device)
            how = (repeats, _WARM_UP, torch.get_num_threads(), str(device))
            for name, taken in seconds.items():
                low, median, high = quartiles(taken)
                latencies[name].append(Latency(batch, median, low, high, *how))
        batch = min(inputs)
        costs = {
            name: _costs_of(model, inputs[batch], device, tuple(latencies[name]), metrics.get(name, {}))
            for name, model in models.items()
        }
        return CostReport(batch, costs)


def _checked_device(
    models: Mapping[str, nn.Module], inputs: Mapping[int, Any], repeats: int, metrics: Mapping[str, Any]
) -> torch.device:
    """The one device of all models, if they can be measured."""
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
    found = {p.device for model in models.values() for p in (*model.parameters(), *model.buffers())}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ValueError(f"models must be on one device to be compared, got {names}; move them with .to()")
    return found.pop() if found else torch.device("cpu")


def _costs_of(
    model: nn.Module, inputs: Any, device: torch.device, latency: tuple[Latency, ...], metrics: Any
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
        file_bytes=file.getbuffer().nbytes,
        compressed_bytes=len(gzip.compress(file.getbuffer(), compresslevel=6)),
        latency=latency,
        metrics=dict(metrics),
    )


def peak_memory(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> int | None:
    """Most bytes alive at once during `model(*inputs)` in evaluation mode, beyond weights and inputs.

    On the CPU these are the tensors between operators, exactly; scratch memory inside an operator is not
    seen. On CUDA it is what the allocator hands out, scratch memory and rounding included; the peak
    statistics of torch.cuda are reset. None on other devices.
    """
    # Not inference mode: in it, operators reach a dispatch mode undivided, so that what they make is hidden.
    with modes_restored(model), generators_restored(), torch.no_grad():
        model.eval()
        if device.type == "cpu":
            memory = _LiveMemory()
            with layers_divided(), memory:
                model(*inputs)
            return memory.peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(*inputs)
            return int(torch.cuda.max_memory_allocated(device)) - before
    return None


class _LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operators make, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for address, storage in _storages(out).items():
            if address not in given:  # neither a view nor in place
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, num_bytes: int) -> None:
        self._now -= num_bytes


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Address -> storage, of the tensors in nested containers."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {storage.data_ptr(): storage for storage in storages}


def in_turns(
    actions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, device: Any = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each action, until the device has done it, once for every round.

    The order is reversed from round to round; `warm_up` rounds go before, not measured, in the given order.
    """
    on_gpu = torch.device(device).type == "cuda"
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    for _ in range(warm_up):
        for action in actions.values():
            action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            wait()
            started = time.perf_counter()
            actions[name]()
            wait()
            taken[name].append(time.perf_counter() - started)
    return taken


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; a single value is all three."""
    # Not those of `statistics`, which may differ by rounding where all values are the same.
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return low, median, high


def time_onnx(
    files: Mapping[str, Path], tensors: Mapping[str, Tensor], repeats: int = 20
) -> dict[str, list[float]]:
    """Seconds of each run on the CPU, on as many threads as torch has.

    Files take turns in three rounds, each with a session of its own that ends before the next begins: the
    threads of a session go on spinning after a run and would slow the others.

    Args:
        files: Name -> file, as `altermoma_pl.export.to_onnx` writes it.
        tensors: The inputs by name, see `altermoma_pl.export.example_tensors`; what a file does not take is
            left out.
        repeats: Timed runs of each file, rounded up to a multiple of three.

    Raises:
        ModuleNotFoundError: Without onnxruntime (extra `export`).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    taken: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(_ONNX_ROUNDS):
        for name, path in files.items():
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            inputs = {each.name: tensors[each.name].detach().cpu().numpy() for each in session.get_inputs()}
            run = {name: partial(session.run, None, inputs)}
            taken[name] += in_turns(run, -(-repeats // _ONNX_ROUNDS), _ONNX_WARM_UP)[name]
            del session, run  # ends the session
    return taken
