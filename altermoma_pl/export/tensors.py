"""Example inputs and outputs of a model, of any structure, as tensors by name."""

from __future__ import annotations

import copy
import inspect
import keyword
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from altermoma_pl.model.inputs import as_arguments, is_named_tuple


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
    only_names = len(arguments) == 1 and _has_names(arguments[0])
    names = [""] if only_names else _parameter_names(model, len(arguments))
    return tuple(
        _map(argument, name, lambda path, tensor: function(_identifier(path), tensor))
        for argument, name in zip(arguments, names, strict=True)
    )


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return names + [f"input_{position}" for position in range(len(names), count)]


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
