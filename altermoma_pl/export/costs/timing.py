"""Timing of actions and of ONNX files, in turns: whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

_ONNX_ROUNDS = 3
_ONNX_WARM_UP = 5


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each action, until the device has done it, once for every round.

    Args:
        actions: Name -> what to time.
        rounds: How often each runs. Their order is reversed from round to round.
        warm_up: How many rounds go before, not measured, in the given order.
        device: Where the actions compute.
    """
    for _ in range(warm_up):
        for action in actions.values():
            action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            _wait_for(device)
            started = time.perf_counter()
            actions[name]()
            _wait_for(device)
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
    taken: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(_ONNX_ROUNDS):
        for name, path in files.items():
            taken[name] += _in_own_session(path, tensors, -(-repeats // _ONNX_ROUNDS))
    return taken


def _in_own_session(path: Path, tensors: Mapping[str, Tensor], repeats: int) -> list[float]:
    """Seconds of each run; the session ends on return."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {each.name: tensors[each.name].detach().cpu().numpy() for each in session.get_inputs()}
    return in_turns({"run": partial(session.run, None, inputs)}, repeats, _ONNX_WARM_UP)["run"]


def _wait_for(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
