"""A model of any inputs and outputs as a program of torch.export that takes and gives tensors by name."""

from __future__ import annotations

import copy
import inspect
import io
import keyword
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from altermoma_pl.model.inputs import as_arguments, is_named_tuple

_TALKATIVE = ("torch.export", "torch.fx", "torch.onnx", "onnxscript", "onnx_ir")  # loggers


def example_tensors(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The tensors of example inputs by name, as the exported model takes them.

    Args:
        model: Names of plain tensors are those of the parameters of its `forward`.
        inputs: A tuple or list of the arguments, or the only one if that is a tensor, a NamedTuple or a
            dictionary. Arguments are tensors and NamedTuples, dictionaries, lists and tuples of them,
            nested; None, numbers and strings in between are kept as they are.

    Returns:
        "image" for a tensor `image`, or the entry `image` of an only NamedTuple or dictionary; else
        parts joined by "_".

    Raises:
        TypeError: The inputs are of another type.
        ValueError: There is no tensor, something of another type, or two tensors have the same name.
    """
    tensors: dict[str, Tensor] = {}
    map_inputs(model, inputs, partial(_note, tensors, "example inputs"))
    if not tensors:
        raise ValueError("there is no tensor among the example inputs: give what `forward` takes")
    return tensors


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by their path, "objects.heatmap", or "output" for a plain one.

    Raises:
        ValueError: There is something of another type, or two tensors have the same path.
    """
    tensors: dict[str, Tensor] = {}
    _map(output, "" if _has_names(output) else "output", partial(_note, tensors, "outputs"))
    return tensors


def _note(tensors: dict[str, Tensor], kind: str, name: str, tensor: Tensor) -> Tensor:
    if name in tensors:
        raise ValueError(f"two {kind} are named {name!r}: rename one of them")
    tensors[name] = tensor
    return tensor


def map_inputs(model: nn.Module, inputs: Any, function: Callable[[str, Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments of `forward` with `function(name, tensor)` for each tensor."""
    arguments = as_arguments(inputs)
    if len(arguments) == 1 and _has_names(arguments[0]):
        names = [""]
    else:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        names += [f"input_{position}" for position in range(len(names), len(arguments))]
    return tuple(
        _map(argument, name, lambda path, tensor: function(_identifier(path), tensor))
        for argument, name in zip(arguments, names, strict=False)
    )


def _identifier(path: str) -> str:
    name = re.sub(r"\W", "_", path)
    if name[:1].isdigit():
        name = f"input_{name}"
    return f"{name}_" if keyword.iskeyword(name) else name


def _map(value: Any, path: str, function: Callable[[str, Tensor], Tensor]) -> Any:
    """The value with `function(path, tensor)` in place of each tensor."""
    if isinstance(value, Tensor):
        return function(path, value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value

    def below(key: Any, part: Any) -> Any:
        return _map(part, f"{path}.{key}" if path else str(key), function)

    if isinstance(value, dict):
        mapped = copy.copy(value)
        mapped.update({key: below(key, part) for key, part in value.items()})
        return mapped
    if is_named_tuple(value):
        return type(value)(*(below(key, part) for key, part in zip(value._fields, value, strict=True)))
    if isinstance(value, (list, tuple)):
        return type(value)(below(position, part) for position, part in enumerate(value))
    raise ValueError(
        f"{path or 'the value'} is of type {type(value).__name__}: a model to export takes and gives "
        "tensors, and NamedTuples, dictionaries, lists and tuples of them"
    )


def _has_names(value: Any) -> bool:
    return isinstance(value, dict) or is_named_tuple(value)


def shapes_of(tensors: dict[str, Tensor]) -> str:
    """Names and shapes for a message."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def program_of(
    model: nn.Module, example_inputs: Any, dynamic: bool
) -> tuple[ExportedProgram, list[str], list[str]]:
    """The program, of the inputs that matter, their names, and those of its outputs. Sets eval mode."""
    tensors = example_tensors(model, example_inputs)
    model.eval()
    with torch.no_grad():
        try:
            outputs = list(output_tensors(model(*as_arguments(example_inputs))))
        except Exception as error:  # of the model, of any kind
            where = _innermost(model, error) or type(model).__name__
            raise ValueError(
                f"{where} does not accept the inputs {shapes_of(tensors)}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not outputs:
            raise ValueError(f"{type(model).__name__} gives no tensor: nothing can be exported")
        program = _exported_program(model, example_inputs, tensors, dynamic)
        read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        inputs = zip(tensors.items(), program.graph_signature.user_inputs, strict=True)
        used = {name: tensor for (name, tensor), node in inputs if node in read}
        small = [name for name, tensor in used.items() if tensor.dim() and len(tensor) < 2]
        if dynamic and small:
            raise ValueError(
                f"the example inputs {small} have fewer than two rows, from which no size that varies can be "
                "traced: give an example of at least two, or dynamic=False"
            )
        if len(used) < len(tensors):
            program = _exported_program(model, example_inputs, used, dynamic)
    return program, list(used), outputs


def _exported_program(
    model: nn.Module, example_inputs: Any, tensors: dict[str, Tensor], dynamic: bool
) -> ExportedProgram:
    """The model as a function of the named tensors, all else as in the example: a dictionary of outputs."""

    def forward(**given: Tensor) -> dict[str, Tensor]:
        arguments = map_inputs(model, example_inputs, lambda name, example: given.get(name, example))
        return output_tensors(model(*arguments))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # torch.export names the inputs of a graph after the parameters.
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in tensors])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    named = nn.Module().eval()
    named.model = model
    named.forward = forward
    # One row, or none, is no size that can vary; if the input does not matter, that is no error.
    shapes = {name: {0: Dim.DYNAMIC} if t.dim() and len(t) > 1 else None for name, t in tensors.items()}
    try:
        with redirect_stderr(io.StringIO()):  # where it prints the graph before it raises
            return torch.export.export(named, (), tensors, dynamic_shapes=shapes if dynamic else None)
    except Exception as error:  # torch.export lets pass whatever the model raises with stand-ins for tensors
        where = _innermost(model, error)
        what = f"{where or type(model).__name__} cannot be traced"
        if where is None:
            what += " with first dimensions that vary"
            advice = "Give dynamic=False, or change what depends on one size"
        else:
            advice = "Sizes and branches must not depend on values of tensors: use torch.where or masks"
        raise ValueError(f"{what}: {first_line(error)} {advice}") from error


@contextmanager
def exporters_silenced() -> Iterator[None]:
    """What the exporters log and warn about concerns torch itself; errors are raised."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
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
