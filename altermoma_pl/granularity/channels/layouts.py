"""From couplings to groups: which positions make one channel, and in which tensors they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import ChannelGroup, Slice
from altermoma_pl.granularity.channels.tracing import HEADS, PRODUCERS, Coupling, Port

_CONVS = nn.modules.conv._ConvNd
_VECTORS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
"""Layers of which every tensor has one number for each channel."""


class Layout(NamedTuple):
    """One way to divide the width of a coupling into channels: reshaped to (outer, channels, inner).

    A channel takes all outer and inner positions. Layers that treat positions one by one allow
    (1, width, 1); attention allows whole heads only, (1, heads, width of a head).
    """

    outer: int
    num_channels: int
    inner: int
    attributes: tuple[tuple[str, str], ...] = ()


class Names:
    """Names of modules and tensors of a model, in its order; of what has several, the first."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kind = model, type(model).__name__
        self.modules = {module: path for path, module in model.named_modules()}
        self.tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.order = {name: i for i, name in enumerate(self.tensors.values())}

    def tensor(self, tensor: Tensor) -> str:
        """Of a parameter or buffer; an error if it is none."""
        name = self.tensors.get(id(tensor))
        if name is None:
            raise ValueError("a weight is computed from other parameters, as weight norm does")
        return name


def layouts(coupling: Coupling, names: Names) -> Iterator[Layout]:
    """Candidates, the finest first: which of them is right only a trial can tell."""
    width = coupling.width
    counts = tuple(_counting_attributes(coupling, names))
    convs = [port.module for port in coupling.ports if isinstance(port.module, _CONVS)]
    grouped = {module.groups for module in convs if module.groups > 1 and not _is_depthwise(module)}
    # The groups of a convolution must stay equal, so that each gives a channel when one goes.
    outer = sorted(grouped) or [1]
    # Halves that are read together, as in gated units, are read as a width that is a part of the whole.
    readers = {len(set(port.positions)) for port in coupling.ports if port.side == "in"}
    outer += sorted(width // n for n in readers if n < width and width % n == 0)
    yield from (Layout(parts, width // parts, 1, counts) for parts in outer if width % parts == 0)
    for path, attribute, heads, parts in _heads(coupling, names):
        if width % (heads * parts) == 0:
            yield Layout(parts, heads, width // (heads * parts), (*counts, (path, attribute)))


def group_of_layout(coupling: Coupling, layout: Layout, names: Names) -> ChannelGroup:
    """The group whose channels are those of the layout; an error says why a layer cannot be divided so."""
    shape = (layout.outer, layout.num_channels, layout.inner)
    number = torch.arange(layout.num_channels)[None, :, None].expand(shape).flatten()  # root -> its channel
    slices: dict[tuple[str, int], Slice] = {}
    for port in coupling.ports:
        channels = number[torch.tensor(port.roots)]
        for tensor, dim in _tensors_of_port(port, names):
            # A grouped convolution reads the same rows of its weight in each of its groups.
            positions = torch.tensor(port.positions) % tensor.shape[dim]
            name = names.tensor(tensor)
            # Sorted, and once: the graph may come to a position on two ways.
            pairs: Tensor = torch.unique(torch.stack([channels, positions], dim=1), dim=0)
            counts = torch.bincount(pairs[:, 0], minlength=layout.num_channels)
            if len(set(counts.tolist())) != 1 or len(set(pairs[:, 1].tolist())) != len(pairs):
                raise ValueError(f"the channels do not divide {name!r} evenly")
            index = pairs[:, 1].reshape(layout.num_channels, -1)
            known = slices.setdefault((name, dim), Slice(name, dim, index))
            # Layers may share a weight and yet read their inputs in another order.
            if not torch.equal(known.index, index):
                raise ValueError(f"{name!r} is used in two places that order its channels differently")
    ordered = sorted(slices.values(), key=lambda each: names.order[each.name])
    layers = [p.module for p in coupling.ports if p.side == "out" and isinstance(p.module, PRODUCERS)]
    producers = sorted({names.tensor(layer.weight) for layer in layers}, key=names.order.__getitem__)
    name = producers[0].rpartition(".")[0] or producers[0]
    return ChannelGroup(name, layout.num_channels, tuple(ordered), tuple(producers), layout.attributes)


def _tensors_of_port(port: Port, names: Names) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a port, and the dimension along which its channels lie; an error for other layers."""
    module, out = port.module, port.side == "out"
    if isinstance(module, nn.Parameter):
        # One that is added or multiplied: its last dimension that is not broadcast.
        long = [dim for dim, size in enumerate(module.shape) if size > 1]
        if long:
            yield module, long[-1]
    elif isinstance(module, PRODUCERS):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        # A depthwise weight is (channels, 1, ...), transposed or not, and its inputs are its outputs.
        yield module.weight, int(transposed == out) if not _is_depthwise(module) else 0
        if module.bias is not None and (out or _is_depthwise(module)):
            yield module.bias, 0
    elif isinstance(module, nn.Embedding):
        yield module.weight, 1
    elif isinstance(module, _VECTORS):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        # One number is that of all channels: PReLU's slope, or how many batches a norm has seen.
        yield from ((tensor, tensor.ndim - 1) for tensor in own if tensor.numel() > 1)
    else:
        kind, path = type(module).__name__, names.modules.get(module, "")
        raise ValueError(f"{path!r} is a {kind}, whose channels cannot be removed one by one")


def _counting_attributes(coupling: Coupling, names: Names) -> Iterator[tuple[str, str]]:
    """(module path, attribute) of layers that count their channels where no tensor tells them."""
    for module in dict.fromkeys(port.module for port in coupling.ports):
        if _is_depthwise(module):
            yield names.modules[module], "groups"
        elif isinstance(module, nn.modules.batchnorm._NormBase) and not module.state_dict():
            yield names.modules[module], "num_features"


def _is_depthwise(module: object) -> bool:
    """Whether a convolution has one filter for each channel."""
    return isinstance(module, _CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def _heads(coupling: Coupling, names: Names) -> Iterator[tuple[str, str, int, int]]:
    """(module path, attribute, number of heads, parts) where the layers belong to an attention module.

    A layer that makes queries, keys and values at once has three parts.
    """
    linears = [p for p in coupling.ports if isinstance(p.module, nn.Linear)]
    readers = [len(set(p.positions)) for p in linears if p.side == "in"]
    parts = coupling.width // readers[0] if readers and coupling.width % readers[0] == 0 else 1
    for path in dict.fromkeys(names.modules[p.module].rpartition(".")[0] for p in linears):
        parent = names.model.get_submodule(path)
        for attribute in HEADS:
            heads = getattr(parent, attribute, None)
            if type(heads) is int and heads > 1:  # not a list of modules, nor a flag
                yield path, attribute, heads, parts


Declared = Mapping[str, Mapping[str, str]]
"""Group name -> module path -> "out", "in", or "in:16" where the channels begin at input 16.

Depthwise convolutions, norms and embeddings are "out". What cannot be declared: other grouped convolutions,
attention heads, and layers that read several inputs of each channel, as after flattening.
"""


def declared_groups(model: nn.Module, declared: Declared) -> list[ChannelGroup]:
    """The groups, not proved yet; an error says what is wrong with a declaration."""
    names, modules, groups = Names(model), dict(model.named_modules()), []
    for name, sides in declared.items():
        parsed = {path: _parse(name, path, side) for path, side in sides.items()}
        unknown = [path for path in parsed if path not in modules]
        if unknown:
            raise ValueError(f"declared group {name!r}: {unknown} are no modules of {names.kind}")
        outs = [path for path, (side, _) in parsed.items() if side == "out"]
        first = next((path for path in outs if isinstance(modules[path], PRODUCERS)), None)
        if first is None:
            raise ValueError(
                f"declared group {name!r} has no convolution or linear layer with side 'out': which "
                f"layer puts the channels out?"
            )
        layer = modules[first]
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        ports = []
        for path, (side, offset) in parsed.items():
            port = Port(modules[path], side, list(range(offset, offset + width)), list(range(width)))
            # Checked here: positions beyond a tensor would be taken for those of a grouped convolution.
            for tensor, dim in _tensors_of_port(port, names):
                if tensor.shape[dim] < offset + width or (side == "out" and tensor.shape[dim] != width):
                    raise ValueError(
                        f"declared group {name!r}: {path!r} has {tensor.shape[dim]} channels, and "
                        f"{first!r} puts out {width}, beginning at {offset}"
                    )
            ports.append(port)
        coupling = Coupling(width, ports)
        finest = Layout(1, width, 1, tuple(_counting_attributes(coupling, names)))
        groups.append(replace(group_of_layout(coupling, finest, names), name=name))
    return groups


def _parse(name: str, path: str, side: str) -> tuple[str, int]:
    kind, _, offset = str(side).partition(":")
    if kind not in ("in", "out") or (offset and (kind == "out" or not offset.isdigit())):
        raise ValueError(
            f"declared group {name!r}: the side of {path!r} must be 'out', 'in', or 'in:16' where its "
            f"channels begin at input 16, got {side!r}"
        )
    return kind, int(offset or 0)
