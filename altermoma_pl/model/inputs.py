"""Example inputs of a model, in the one form that all functions take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as the positional arguments of a model.

    Args:
        example_inputs: A tuple or list of the arguments; or the only argument: a tensor, a NamedTuple or a
            dictionary. An only argument of another type goes into a tuple, `(batch,)`.

    Raises:
        TypeError: If it is of another type.
        ValueError: If the tuple or list is empty.
    """
    if isinstance(example_inputs, (Tensor, dict)) or is_named_tuple(example_inputs):
        return (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            "example inputs must be a tuple or list of the positional arguments, or the only one if it is a "
            f"tensor, a NamedTuple or a dictionary, got {type(example_inputs).__name__}: give it as (batch,)"
        )
    if not example_inputs:
        raise ValueError("there is no tensor among the example inputs: give what `forward` takes")
    return tuple(example_inputs)


def as_forward(example_inputs: Any) -> Callable[[nn.Module], Any]:
    """A function that runs a model on example inputs; or the given one, which may return a loss."""
    if callable(example_inputs):
        return example_inputs  # type: ignore[no-any-return]
    arguments = as_arguments(example_inputs)
    return lambda model: model(*arguments)


def is_named_tuple(value: Any) -> bool:
    """Whether this is a NamedTuple, which is one argument, where a plain tuple is several."""
    return isinstance(value, tuple) and hasattr(value, "_fields")
