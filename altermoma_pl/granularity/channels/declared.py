"""Groups of channels that a user declares where no graph can follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from altermoma_pl.granularity.channels.groups import ChannelGroup
from altermoma_pl.granularity.channels.layouts import (
    Layout,
    Names,
    counting_attributes,
    group_of_layout,
    tensors_of_port,
)
from altermoma_pl.granularity.channels.tracing import PRODUCERS, Coupling, Port

Declared = Mapping[str, Mapping[str, str]]
"""Group name -> module path -> "out", "in", or "in:16" where the channels begin at input 16.

Depthwise convolutions, norms and embeddings are "out". What cannot be declared: other grouped convolutions,
attention heads, and layers that read several inputs of each channel, as after flattening.
"""


def declared_groups(model: nn.Module, declared: Declared) -> list[ChannelGroup]:
    """The groups, not proved yet; an error says what is wrong with a declaration."""
    names = Names(model)
    return [_group(names, name, sides) for name, sides in declared.items()]


def _group(names: Names, name: str, sides: Mapping[str, str]) -> ChannelGroup:
    parsed = {path: _parse(name, path, side) for path, side in sides.items()}
    modules = dict(names.model.named_modules())
    unknown = [path for path in parsed if path not in modules]
    if unknown:
        raise ValueError(f"declared group {name!r}: {unknown} are no modules of {names.kind}")
    outs = [path for path, (side, _) in parsed.items() if side == "out"]
    producers = [path for path in outs if isinstance(modules[path], PRODUCERS)]
    if not producers:
        raise ValueError(
            f"declared group {name!r} has no convolution or linear layer with side 'out': which layer puts "
            f"the channels out?"
        )
    first = modules[producers[0]]
    width = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    ports = [
        Port(modules[path], side, list(range(offset, offset + width)), list(range(width)))
        for path, (side, offset) in parsed.items()
    ]
    # Checked here: positions beyond a tensor would be taken for those of a grouped convolution.
    for port, (path, (side, offset)) in zip(ports, parsed.items(), strict=True):
        for tensor, dim in tensors_of_port(port, names):
            if tensor.shape[dim] < offset + width or (side == "out" and tensor.shape[dim] != width):
                raise ValueError(
                    f"declared group {name!r}: {path!r} has {tensor.shape[dim]} channels, and "
                    f"{producers[0]!r} puts out {width}, beginning at {offset}"
                )
    coupling = Coupling(width, ports)
    finest = Layout(1, width, 1, tuple(counting_attributes(coupling, names)))
    return replace(group_of_layout(coupling, finest, names), name=name)


def _parse(name: str, path: str, side: str) -> tuple[str, int]:
    kind, _, offset = str(side).partition(":")
    if kind not in ("in", "out") or (offset and (kind == "out" or not offset.isdigit())):
        raise ValueError(
            f"declared group {name!r}: the side of {path!r} must be 'out', 'in', or 'in:16' where its "
            f"channels begin at input 16, got {side!r}"
        )
    return kind, int(offset or 0)
