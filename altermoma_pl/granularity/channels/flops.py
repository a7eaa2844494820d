"""What a model with fewer channels would compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from altermoma_pl.granularity.channels.groups import Channels
from altermoma_pl.granularity.channels.tracing import Forward


class FlopModel:
    """FLOPs of a forward pass by the widths of its groups: those of a layer go with the size of its weight.

    Operators without a weight, such as attention's products, count as they are.

    Args:
        model: The dense model.
        forward: Runs it on example inputs.
        channels: Its groups.
    """

    def __init__(self, model: nn.Module, forward: Forward, channels: Channels) -> None:
        self.total, by_weight = _count(model, forward)
        named = {name: p for name, p in model.named_parameters() if id(p) in by_weight}
        self._flops = {name: by_weight[id(p)] for name, p in named.items()}
        self._sizes = {name: p.shape for name, p in named.items()}
        self._slices = [
            (group, each) for group in channels.groups for each in group.slices if each.name in named
        ]

    def __call__(self, widths: Mapping[str, int]) -> float:
        """FLOPs with so many channels of each group."""
        gone: dict[tuple[str, int], int] = {}
        for group, each in self._slices:
            missing = (group.num_channels - widths[group.name]) * each.index.shape[1]
            gone[each.name, each.dim] = gone.get((each.name, each.dim), 0) + missing
        saved = 0.0
        for name, flops in self._flops.items():
            share = 1.0
            for dim, size in enumerate(self._sizes[name]):
                share *= (size - gone.get((name, dim), 0)) / size
            saved += flops * (1 - share)
        return self.total - saved


@torch.no_grad()
def _count(model: nn.Module, forward: Forward) -> tuple[float, dict[int, float]]:
    """FLOPs in all, and by the identity of the weight of each layer."""
    counter, by_weight, before = FlopCounterMode(display=False), dict[int, float](), dict[nn.Module, int]()

    def enter(module: nn.Module, _: object) -> None:
        before[module] = counter.get_total_flops()

    def leave(module: nn.Module, _: object, __: object) -> None:
        key = id(module.weight)
        by_weight[key] = by_weight.get(key, 0.0) + counter.get_total_flops() - before[module]

    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with counter:
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return float(counter.get_total_flops()), by_weight
