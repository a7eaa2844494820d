"""What a model with fewer channels would compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from altermoma_pl.structured.groups import Channels
from altermoma_pl.structured.tracing import Forward


class FlopModel:
    """FLOPs of a forward pass by the widths of its groups: those of a layer go with the size of its weight.

    Operators without a weight, such as attention's products, count as they are.

    Args:
        model: The dense model.
        forward: Runs it on example inputs.
        channels: Its groups.
    """

    def __init__(self, model: nn.Module, forward: Forward, channels: Channels) -> None:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            forward(model)
        counts = {path: sum(by_operator.values()) for path, by_operator in counter.get_flop_counts().items()}
        self.total = float(counter.get_total_flops())
        root = type(model).__name__
        weights: dict[int, float] = {}
        for path, module in model.named_modules():
            flops = counts.get(f"{root}.{path}", 0)
            if (
                flops
                and not list(module.children())
                and isinstance(getattr(module, "weight", None), nn.Parameter)
            ):
                weights[id(module.weight)] = weights.get(id(module.weight), 0.0) + flops
        self._flops, self._sizes = {}, {}
        for name, parameter in model.named_parameters():
            if id(parameter) in weights:
                self._flops[name], self._sizes[name] = weights[id(parameter)], parameter.shape
        self._slices = [
            (group, each) for group in channels.groups for each in group.slices if each.name in self._flops
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
