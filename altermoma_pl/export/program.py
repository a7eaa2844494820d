"""A model as a program of torch.export that takes its tensors by name; errors say in which module."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from altermoma_pl.export.tensors import example_tensors, map_inputs, output_tensors, shapes_of

_NOISY = ("torch.export", "torch.fx", "torch.onnx", "onnxscript", "onnx_ir")  # loggers


def program_of(
    model: nn.Module, example_inputs: Any, dynamic: bool
) -> tuple[ExportedProgram, list[str], list[str]]:
    """The program, of the inputs that matter, their names, and those of its outputs. Sets eval mode."""
    tensors = example_tensors(model, example_inputs)
    model.eval()
    with torch.no_grad():
        named = _by_name(model, example_inputs, list(tensors))
        try:
            outputs = list(named(**tensors))
        except Exception as error:  # of the model, of any kind
            where = _innermost(model, error) or type(model).__name__
            raise ValueError(
                f"{where} does not accept the inputs {shapes_of(tensors)}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not outputs:
            raise ValueError(f"{type(model).__name__} gives no tensor: nothing can be exported")
        program = _exported_program(named, tensors, dynamic, model)
        used = _used(program, tensors)
        if dynamic:
            _check_rows(used)
        if len(used) < len(tensors):
            named = _by_name(model, example_inputs, list(used))
            program = _exported_program(named, used, dynamic, model)
    return program, list(used), outputs


def _exported_program(
    named: nn.Module, tensors: dict[str, Tensor], dynamic: bool, model: nn.Module
) -> ExportedProgram:
    # One row, or none, is no size that can vary; if the input does not matter, that is no error.
    shapes = {name: {0: Dim.DYNAMIC} if t.dim() and len(t) > 1 else None for name, t in tensors.items()}
    try:
        with redirect_stderr(io.StringIO()):  # where it prints the graph before it raises
            return torch.export.export(named, (), tensors, dynamic_shapes=shapes if dynamic else None)
    except Exception as error:  # torch.export lets pass whatever the model raises with stand-ins for tensors
        where = _innermost(model, error)
        if where is not None:
            raise ValueError(
                f"{where} cannot be traced: {first_line(error)} Sizes and branches must not "
                "depend on values of tensors: use torch.where or masks"
            ) from error
        raise ValueError(
            f"{type(model).__name__} cannot be traced with first dimensions that vary: {first_line(error)} "
            "Give dynamic=False, or change what depends on one size"
        ) from error


def _by_name(model: nn.Module, example_inputs: Any, names: list[str]) -> nn.Module:
    """The model as a function of the named tensors, all else as in the example: a dictionary of outputs."""

    def forward(**tensors: Tensor) -> dict[str, Tensor]:
        arguments = map_inputs(model, example_inputs, lambda name, example: tensors.get(name, example))
        return output_tensors(model(*arguments))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # torch.export names the inputs of a graph after the parameters.
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    named = nn.Module()
    named.model = model
    named.forward = forward
    return named.eval()


def _used(program: ExportedProgram, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that something is computed from."""
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    inputs = zip(tensors.items(), program.graph_signature.user_inputs, strict=True)
    return {name: tensor for (name, tensor), node in inputs if node in read}


def _check_rows(tensors: dict[str, Tensor]) -> None:
    small = [name for name, tensor in tensors.items() if tensor.dim() and len(tensor) < 2]
    if small:
        raise ValueError(
            f"the example inputs {small} have fewer than two rows, from which no size that varies can be "
            "traced: give an example of at least two, or dynamic=False"
        )


@contextmanager
def exporters_silenced() -> Iterator[None]:
    """What the exporters log and warn about concerns torch itself; errors are raised."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _innermost(model: nn.Module, error: BaseException) -> str | None:
    """The innermost module of the model whose method raised the error or let it pass."""
    names = {id(module): f"{name} ({type(module).__name__})" for name, module in model.named_modules()}
    names[id(model)] = type(model).__name__
    passed = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((names[id(each)] for each in reversed(passed) if id(each) in names), None)


def first_line(error: BaseException) -> str:
    """What the message of an error begins with, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return line if line.endswith((".", "!", "?")) else f"{line}."
