"""From couplings to groups: which positions make one channel, and in which tensors they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import ChannelGroup, Slice
from altermoma_pl.granularity.channels.tracing import HEADS, PRODUCERS, Coupling, Port

_CONVS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class Layout(NamedTuple):
    """How a width divides: as (outer, channels, inner), of which a channel takes all outer and inner."""

    outer: int
    num_channels: int
    inner: int
    attributes: tuple[tuple[str, str], ...] = ()


class Names:
    """Names of modules and tensors of a model; of what has several, the first."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {module: path for path, module in model.named_modules()}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.model = model

    def tensor(self, tensor: Tensor) -> str:
        """Of a parameter or buffer.

        Raises:
            ValueError: If it is none.
        """
        name = self.parameters.get(id(tensor)) or self.buffers.get(id(tensor))
        if name is None:
            raise ValueError("a weight is computed from other parameters, as weight norm does")
        return name


def layouts(coupling: Coupling, names: Names) -> Iterator[Layout]:
    """Candidates, the finest first."""
    width = coupling.width
    modules = dict.fromkeys(p.module for p in coupling.ports if isinstance(p.module, _CONVS))
    depthwise = tuple((names.modules[module], "groups") for module in modules if is_depthwise(module))
    counts = (*depthwise, *_bare_norms(coupling, names))
    grouped = {module.groups for module in modules if _is_grouped(module)}
    if not grouped:
        yield Layout(1, width, 1, counts)
    for groups in sorted(grouped):
        if width % groups == 0:
            yield Layout(groups, width // groups, 1, counts)
    for parts in _parts(coupling):  # halves that are read together, as in gated units
        yield Layout(parts, width // parts, 1, counts)
    for path, attribute, heads, parts in _heads(coupling, names):
        if width % (heads * parts) == 0:
            yield Layout(parts, heads, width // (heads * parts), (*counts, (path, attribute)))


def group_of_layout(coupling: Coupling, layout: Layout, names: Names) -> ChannelGroup:
    """The group whose channels are those of the layout.

    Raises:
        ValueError: If a layer cannot be divided so, with the reason.
    """
    shape = (layout.outer, layout.num_channels, layout.inner)
    number = torch.arange(layout.num_channels)[None, :, None].expand(shape).flatten()  # root -> its channel
    slices: dict[tuple[str, int], Slice] = {}
    producers = []
    for port in coupling.ports:
        for tensor, dim in tensors_of_port(port, names):
            positions = _positions(port, tensor.shape[dim])
            channel = number[torch.tensor(port.roots)]
            name = names.tensor(tensor)
            index = _index(name, positions, channel, layout.num_channels)
            known = slices.setdefault((name, dim), Slice(name, dim, index))
            if not torch.equal(known.index, index):
                raise ValueError(f"{name!r} is used in two places that order its channels differently")
        if port.side == "out" and isinstance(port.module, PRODUCERS):
            producers.append(names.tensor(port.module.weight))
    order = {name: i for i, name in enumerate([*names.parameters.values(), *names.buffers.values()])}
    ordered = sorted(slices.values(), key=lambda each: order[each.name])
    producers.sort(key=order.__getitem__)
    return ChannelGroup(
        producers[0].rpartition(".")[0] or producers[0],
        layout.num_channels,
        tuple(ordered),
        tuple(dict.fromkeys(producers)),
        layout.attributes,
    )


def _positions(port: Port, size: int) -> Tensor:
    """Along the dimension; a grouped convolution reads the same rows in each of its groups."""
    return torch.tensor(port.positions) % size


def _index(name: str, positions: Tensor, channel: Tensor, num_channels: int) -> Tensor:
    """(num_channels, k) from the channel of each position."""
    pairs = sorted(set(zip(channel.tolist(), positions.tolist(), strict=True)))
    counts = torch.bincount(torch.tensor([c for c, _ in pairs]), minlength=num_channels)
    if len(set(counts.tolist())) != 1 or len({p for _, p in pairs}) != len(pairs):
        raise ValueError(f"the channels do not divide {name!r} evenly")
    return torch.tensor([p for _, p in pairs]).view(num_channels, -1)


def tensors_of_port(port: Port, names: Names) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a port, and the dimension along which its channels lie.

    Raises:
        ValueError: If the layer is not known.
    """
    module, out = port.module, port.side == "out"
    if isinstance(module, nn.Parameter):
        long = [dim for dim, size in enumerate(module.shape) if size > 1]
        if long:
            yield module, long[-1]
    elif isinstance(module, PRODUCERS):
        transposed = isinstance(module, _TRANSPOSED)
        yield module.weight, int(transposed == out) if not is_depthwise(module) else 0
        if module.bias is not None and (out or is_depthwise(module)):
            yield module.bias, 0
    elif isinstance(module, nn.Embedding):
        yield module.weight, 1
    elif isinstance(module, (*_NORMS, nn.PReLU)):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        yield from ((tensor, tensor.ndim - 1) for tensor in own if tensor.numel() > 1)
    else:
        kind, path = type(module).__name__, names.modules.get(module, "")
        raise ValueError(f"{path!r} is a {kind}, whose channels cannot be removed one by one")


def _parts(coupling: Coupling) -> list[int]:
    """In how many parts a width is cut that layers read as one."""
    readers = {len(set(port.positions)) for port in coupling.ports if port.side == "in"}
    return sorted(coupling.width // n for n in readers if n < coupling.width and coupling.width % n == 0)


def _bare_norms(coupling: Coupling, names: Names) -> Iterator[tuple[str, str]]:
    """(module path, attribute) of norms without a tensor that tells their width."""
    for module in dict.fromkeys(port.module for port in coupling.ports):
        if isinstance(module, nn.modules.batchnorm._NormBase) and not module.state_dict():
            yield names.modules[module], "num_features"


def is_depthwise(module: object) -> bool:
    """Whether a convolution has one filter for each channel."""
    return isinstance(module, _CONVS) and 1 < module.groups == module.in_channels == module.out_channels


def _is_grouped(module: object) -> bool:
    return isinstance(module, _CONVS) and module.groups > 1 and not is_depthwise(module)


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
            if type(heads) is int and heads > 1:
                yield path, attribute, heads, parts
