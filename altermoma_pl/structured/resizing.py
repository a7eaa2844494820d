"""Making tensors smaller: those of a model, of its state, of an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.structured.groups import ChannelGroup, Channels

Attributes = dict[str, dict[str, Any]]
"""Module path -> attribute -> value."""


@dataclass(frozen=True, eq=False)
class Resizing:
    """Which positions of which tensors stay.

    Args:
        positions: Tensor name -> dimension -> positions that stay, ascending.
        counts: (module path, attribute) -> (channels that stay, of how many).
    """

    positions: Mapping[str, Mapping[int, Tensor]]
    counts: Mapping[tuple[str, str], tuple[int, int]]

    @classmethod
    def of(
        cls,
        channels: Channels | tuple[ChannelGroup, ...],
        kept: Mapping[str, Tensor],
        sizes: Mapping[str, torch.Size],
    ) -> Resizing:
        """What stays of tensors with these sizes if these channels do.

        Args:
            channels: The groups.
            kept: Group name -> (num_channels,) booleans.
            sizes: Name -> size of each parameter and buffer.
        """
        groups = channels.groups if isinstance(channels, Channels) else channels
        stay: dict[str, dict[int, Tensor]] = {}
        counts = {}
        for group in groups:
            flags = kept[group.name].cpu()
            if bool(flags.all()):
                continue
            for each in group.slices:
                whole = torch.ones(sizes[each.name][each.dim], dtype=torch.bool)
                along = stay.setdefault(each.name, {}).setdefault(each.dim, whole)
                along[each.index[~flags].flatten()] = False
            for attribute in group.attributes:
                counts[attribute] = (int(flags.sum()), group.num_channels)
        positions = {
            name: {dim: flags.nonzero().flatten() for dim, flags in dims.items()}
            for name, dims in stay.items()
        }
        return cls(positions, counts)

    def resized(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a tensor of this name that stays; itself if all does."""
        for dim, positions in self.positions.get(name, {}).items():
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Make the parameters and buffers of a model smaller, in place, as new objects.

        Parameters that are tied stay tied. Whoever holds the old ones, such as an optimizer, is made anew.
        """
        new: dict[int, nn.Parameter] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for _, module in model.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                name = names[id(parameter)]
                if name not in self.positions:
                    continue
                if id(parameter) not in new:
                    smaller = self.resized(name, parameter.detach()).contiguous()
                    new[id(parameter)] = nn.Parameter(smaller, parameter.requires_grad)
                setattr(module, leaf, new[id(parameter)])
        for name, buffer in list(model.named_buffers()):
            if name in self.positions:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, self.resized(name, buffer).contiguous())
        for (path, attribute), (kept, total) in self.counts.items():
            module = model.get_submodule(path)
            setattr(module, attribute, getattr(module, attribute) * kept // total)
        for path in {name.rpartition(".")[0] for name in self.positions}:
            for attribute, value in widths_of(model.get_submodule(path)).items():
                setattr(model.get_submodule(path), attribute, value)


def widths_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of a layer of torch that its weights determine, as they should be."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": weight.shape[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight.shape[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.numel()}
    return {}


def changed_attributes(before: nn.Module, after: nn.Module) -> Attributes:
    """Numbers, and tuples of them, that differ between two models with the same modules."""
    old = dict(before.named_modules())
    changed: Attributes = {}
    for path, module in after.named_modules():
        for name, value in _numbers(module):
            if getattr(old[path], name, None) != value:
                changed.setdefault(path, {})[name] = value
    return changed


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if type(value) is int or (type(value) is tuple and all(type(each) is int for each in value)):
            yield name, value
