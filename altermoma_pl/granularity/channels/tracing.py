"""Which channels are coupled, from the dependency graph of torch-pruning (extra `structured`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module], Any]
"""Runs a model on example inputs; returns tensors, in tuples, lists and dictionaries, or a loss."""

PRODUCERS = (nn.modules.conv._ConvNd, nn.Linear)
"""Layers that put channels out."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
"""What attention modules call the number of their heads."""


class Port(NamedTuple):
    """One side of a layer, and which of its channels are coupled.

    Its outputs or inputs at `positions` are the channels that the first layer of the coupling puts out at
    `roots`, one by one: a linear layer behind a flattening reads each root at several positions.
    """

    module: nn.Module | nn.Parameter
    side: str  # "out" or "in"
    positions: list[int]
    roots: list[int]


class Coupling(NamedTuple):
    """All ports through which the same channels go, so that they can only be removed together.

    It is what the graph tells, not yet what is true; `width` is the number of outputs of the first layer.
    """

    width: int
    ports: list[Port]


def couplings_of(model: nn.Module, forward: Forward) -> list[Coupling]:
    """The couplings of a model, as its backward graph tells them.

    They are candidates: operators that mix channels look like those that do not. Whatever the forward pass or
    torch-pruning raises is raised.
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
    with warnings.catch_warnings(), trainable(model), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, None, forward_fn=run, verbose=False)
        return list(_couplings(graph, model))


def _couplings(graph: Any, model: nn.Module) -> Iterator[Coupling]:
    """One for each layer whose outputs no earlier coupling has."""
    seen: set[object] = set()
    parts = set(model.modules())
    for module in model.modules():
        if module not in graph.module2node or module in seen or not isinstance(module, PRODUCERS):
            continue
        width = graph.get_pruner_of_module(module).get_out_channels(module)
        ports = partial(_ports, graph, parts, module)
        # Where the first and the last channel touch as much, and no other output of this layer, all do.
        first, last = ports([0]), ports([width - 1])
        lengths = [{key: len(port.positions) for key, port in each.items()} for each in (first, last)]
        if lengths[0] == lengths[1] and first[module, "out"].positions == [0]:
            coupled = ports([*range(width)])
        else:  # outputs part, or are coupled with each other: asked at once, the graph takes minutes
            coupled = ports(*([channel] for channel in range(width)))
        seen |= {port.module for port in coupled.values() if port.side == "out"}
        yield Coupling(width, list(coupled.values()))


def _ports(
    graph: Any, parts: set[nn.Module], layer: nn.Module, *asked: list[int]
) -> dict[tuple[Any, str], Port]:
    """What is coupled with the outputs of a layer, asked for some of them after the other."""
    found: dict[tuple[Any, str], Port] = {}
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    for item in chain.from_iterable(graph.get_pruning_group(layer, prune, outputs) for outputs in asked):
        target = item.dep.target.module
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        # All else are operators: torch-pruning makes a layer for each concatenation and view.
        if target in parts or isinstance(target, nn.Parameter):
            port = found.setdefault((target, side), Port(target, side, [], []))
            port.positions.extend(item.idxs)
            port.roots.extend(item.root_idxs)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in order."""
    # Not torch's pytree, to which a subclass of dict or list is one leaf: detectors return such.
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in tensors_of(each)]
    return []


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
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
