"""Timing of ONNX files by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from altermoma_pl.export.costs.timing import in_turns

ROUNDS = 3


def time_onnx(
    files: Mapping[str, Path], tensors: Mapping[str, Tensor], repeats: int = 20, warm_up: int = 5
) -> dict[str, list[float]]:
    """Seconds of each run on the CPU, on as many threads as torch has.

    Files take turns in three rounds, each with a session of its own that ends before the next begins: the
    threads of a session go on spinning after a run and would slow the others.

    Args:
        files: Name -> file, as `altermoma_pl.export.to_onnx` writes it.
        tensors: The inputs by name, see `altermoma_pl.export.example_tensors`; what a file does not take is
            left out.
        repeats: Timed runs of each file, rounded up to a multiple of three.
        warm_up: Runs before these, in each round.

    Raises:
        ModuleNotFoundError: Without onnxruntime (extra `export`).
    """
    taken: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(ROUNDS):
        for name, path in files.items():
            taken[name] += _in_own_session(path, tensors, -(-repeats // ROUNDS), warm_up)
    return taken


def _in_own_session(path: Path, tensors: Mapping[str, Tensor], repeats: int, warm_up: int) -> list[float]:
    """Seconds of each run; the session ends on return."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {each.name: tensors[each.name].detach().cpu().numpy() for each in session.get_inputs()}
    return in_turns({"run": partial(session.run, None, inputs)}, repeats, warm_up)["run"]
