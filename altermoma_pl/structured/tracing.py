"""Which channels are coupled, from the dependency graph of torch-pruning (extra `structured`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module], Any]
"""Runs a model on example inputs; returns tensors, in tuples, lists and dictionaries, or a loss."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
"""What attention modules call the number of their heads."""


class Port(NamedTuple):
    """One side of a layer: its output or input channels at `positions` are those of the group at `roots`."""

    module: nn.Module | nn.Parameter
    side: str  # "out" or "in"
    positions: list[int]
    roots: list[int]


class Coupling(NamedTuple):
    """Ports that share channels; `width` of them at the first layer."""

    width: int
    ports: list[Port]


def trace(model: nn.Module, forward: Forward) -> list[Coupling]:
    """The couplings of a model, as its backward graph tells them.

    They are candidates: operators that mix channels look like those that do not.

    Raises:
        ModuleNotFoundError: Without torch-pruning.
        ValueError: If the forward pass fails, or nothing that it returns depends on the parameters.
    """
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "removing channels needs torch-pruning: pip install 'altermoma-pl[structured]'"
        ) from error
    modes = {module: module.training for module in model.modules()}

    def run(traced: nn.Module, _: object) -> list[Tensor]:
        for module, training in modes.items():  # the graph switches to evaluation mode
            module.training = training
        outputs = [each for each in tensors_of(forward(traced)) if each.requires_grad]
        if not outputs:
            raise ValueError(
                f"nothing that {type(traced).__name__} returns depends on its parameters through a graph: "
                f"it is detached or computed without gradients, so that channels cannot be followed"
            )
        return outputs

    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), _trainable(model), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, None, forward_fn=run, verbose=False)
        groups = list(graph.get_all_groups())
    couplings = []
    for group in groups:
        ports = [
            Port(
                item.dep.target.module,
                "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in",
                list(item.idxs),
                list(item.root_idxs),
            )
            for item in group
            if item.dep.target.module in modes or isinstance(item.dep.target.module, nn.Parameter)
        ]
        couplings.append(Coupling(len(group[0].idxs), ports))
    return couplings


def tensors_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_of(each)]
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in tensors_of(each)]
    return []


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """The graph is that of gradients, and frozen layers have none."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
