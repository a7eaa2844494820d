"""Making tensors smaller: those of a model, of its state, of an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import ChannelGroup, Channels

Attributes = dict[str, dict[str, Any]]
"""Module path -> attribute -> value."""


@dataclass(frozen=True, eq=False)
class Resizing:
    """Which positions of which tensors stay.

    Args:
        positions: Tensor name -> dimension -> positions that stay, ascending. Of what has several names, as
            tied parameters have, each.
        counts: (module path, attribute) -> (channels that stay, of how many).
    """

    positions: Mapping[str, Mapping[int, Tensor]]
    counts: Mapping[tuple[str, str], tuple[int, int]]

    @classmethod
    def of(
        cls,
        channels: Channels | tuple[ChannelGroup, ...],
        kept: Mapping[str, Tensor],
        model: nn.Module,
    ) -> Resizing:
        """What stays of the tensors of a model if these channels do.

        Args:
            channels: The groups.
            kept: Group name -> (num_channels,) booleans.
            model: Of the dense shapes.
        """
        groups = channels.groups if isinstance(channels, Channels) else channels
        tensors = dict(named_tensors(model))
        stay: dict[str, dict[int, Tensor]] = {}
        counts = {}
        for group in groups:
            flags = kept[group.name].cpu()
            if bool(flags.all()):
                continue
            for each in group.slices:
                whole = torch.ones(tensors[each.name].shape[each.dim], dtype=torch.bool)
                along = stay.setdefault(each.name, {}).setdefault(each.dim, whole)
                along[each.index[~flags].flatten()] = False
            for attribute in group.attributes:
                counts[attribute] = (int(flags.sum()), group.num_channels)
        positions = {
            id(tensors[name]): {dim: flags.nonzero().flatten() for dim, flags in dims.items()}
            for name, dims in stay.items()
        }
        return cls({name: positions[id(t)] for name, t in tensors.items() if id(t) in positions}, counts)

    def resized(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a tensor of this name that stays, in the same memory format; itself if all does."""
        memory_format = memory_format_of(tensor)
        for dim, positions in self.positions.get(name, {}).items():
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor.contiguous(memory_format=memory_format) if name in self.positions else tensor

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Make the parameters and buffers of a model smaller, in place, as new objects.

        Tensors that are shared stay so. Whoever holds the old ones, such as an optimizer, is made anew.
        """
        new: dict[int, Tensor] = {}
        for name, old in list(named_tensors(model)):
            if name not in self.positions:
                continue
            if id(old) not in new:
                smaller = self.resized(name, old.detach())
                trained = isinstance(old, nn.Parameter)
                new[id(old)] = nn.Parameter(smaller, old.requires_grad) if trained else smaller
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new[id(old)])
        for (path, attribute), (kept, total) in self.counts.items():
            module = model.get_submodule(path)
            setattr(module, attribute, getattr(module, attribute) * kept // total)
        for path in {name.rpartition(".")[0] for name in self.positions}:
            for attribute, value in widths_of(model.get_submodule(path)).items():
                setattr(model.get_submodule(path), attribute, value)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is."""
    if tensor.ndim not in (4, 5) or tensor.is_contiguous():
        return torch.contiguous_format
    last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
    return last if tensor.is_contiguous(memory_format=last) else torch.contiguous_format


def widths_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of a layer of torch that its weights determine, as they should be."""
    weight = getattr(module, "weight", None)
    if weight is None:  # a norm without affine
        weight = getattr(module, "running_mean", None)
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    for kind, attributes in _SIZES.items():
        if isinstance(module, kind):
            return dict(zip(attributes, weight.shape, strict=True))
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(weight.shape)}
    return {}


_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}
"""Layer -> attributes that are the sizes of its weight."""


def attributes_of(model: nn.Module) -> Attributes:
    """Numbers, and tuples of them, that its modules hold."""
    return {
        path: {name: value for name, value in vars(module).items() if _is_number(value)}
        for path, module in model.named_modules()
    }


def changed_attributes(before: Attributes, after: Attributes) -> Attributes:
    """Those of `after` that differ."""
    changed = {
        path: {name: value for name, value in values.items() if before[path].get(name) != value}
        for path, values in after.items()
    }
    return {path: values for path, values in changed.items() if values}


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is tuple and all(type(each) is int for each in value))
