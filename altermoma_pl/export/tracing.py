"""A model as a program of torch.export that takes its tensors by name; errors say in which module."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from altermoma_pl.export.tensors import example_tensors, map_inputs, output_tensors, shapes_of

_NOISY = ("torch.export", "torch.fx", "torch.onnx", "onnxscript", "onnx_ir")  # loggers


def trace(model: nn.Module, example_inputs: Any, dynamic: bool) -> tuple[ExportedProgram, list[str]]:
    """The program, of the inputs that matter, and the names of its outputs. Sets eval mode."""
    tensors = example_tensors(model, example_inputs)
    if dynamic:
        _check_rows(tensors)
    model.eval()
    with torch.no_grad(), _followed(model) as running:
        named = _by_name(model, example_inputs, list(tensors))
        try:
            outputs = list(named(**tensors))
        except Exception as error:  # of the model, of any kind
            raise ValueError(
                f"{_where(running, model)} does not accept the example inputs {shapes_of(tensors)}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not outputs:
            raise ValueError(f"{type(model).__name__} gives no tensor: nothing can be exported")
        program = _export(named, tensors, dynamic, running, model)
        used = {name: tensors[name] for name in tensors if name in _used(program)}
        if len(used) < len(tensors):
            named = _by_name(model, example_inputs, list(used))
            program = _export(named, used, dynamic, running, model)
    return program, outputs


def _export(
    named: nn.Module, tensors: dict[str, Tensor], dynamic: bool, running: list[str], model: nn.Module
) -> ExportedProgram:
    shapes = {name: {0: Dim.DYNAMIC} if tensor.dim() else None for name, tensor in tensors.items()}
    running.clear()
    try:
        return torch.export.export(named, (), tensors, dynamic_shapes=shapes if dynamic else None)
    except Exception as error:  # torch.export lets pass whatever the model raises with stand-ins for tensors
        if running:
            raise ValueError(
                f"{_where(running, model)} cannot be traced: {first_line(error)} Sizes and branches must not "
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


def _used(program: ExportedProgram) -> set[str]:
    return {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}


def _check_rows(tensors: dict[str, Tensor]) -> None:
    small = [name for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] < 2]
    if small:
        raise ValueError(
            f"the example inputs {small} have fewer than two rows, from which no size that varies can be "
            "traced: give an example of at least two, or dynamic=False"
        )


@contextmanager
def _followed(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list of the modules that are running, outermost first; an exception leaves it as it was."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            while running and running.pop() != name:  # above it: modules whose exception was caught
                pass

        return hook

    handles = []
    for path, module in model.named_modules():
        name = f"{path} ({type(module).__name__})" if path else type(module).__name__
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
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


def _where(running: list[str], model: nn.Module) -> str:
    return running[-1] if running else type(model).__name__


def first_line(error: BaseException) -> str:
    """What the message of an error begins with, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return line if line.endswith((".", "!", "?")) else f"{line}."
