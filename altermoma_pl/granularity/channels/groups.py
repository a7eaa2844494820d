"""Groups of coupled channels: what must be removed together, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.modality import SHARED

Kept = dict[str, Tensor]
"""Group name -> which of its channels stay, booleans of shape (num_channels,)."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the channels of a group lie in one parameter or buffer.

    Args:
        name: Of the parameter or buffer.
        dim: The dimension along which channels lie.
        index: (num_channels, k) positions along `dim`: k of them for each channel, for example the columns
            of a linear layer that read one flattened channel.
    """

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that several layers share: the c-th of all slices is one channel, removed as a whole.

    Args:
        name: Module path of the first layer that puts the channels out.
        num_channels: Their number. With attention a channel is a head; with grouped convolutions, one
            channel of each group.
        slices: Where they lie, in the model's order.
        producers: Names of the weights whose outputs they are.
        attributes: (module path, attribute) pairs that count the channels, such as `num_heads`.
    """

    name: str
    num_channels: int
    slices: tuple[Slice, ...]
    producers: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = ()

    def positions(self) -> Iterator[tuple[str, int, int]]:
        """(tensor name, dimension, position) of everything that is removed with a channel."""
        for each in self.slices:
            yield from ((each.name, each.dim, int(position)) for position in each.index.flatten())

    def step(self, round_to: int) -> int:
        """Number of channels by which widths of the producers change by multiples of `round_to`."""
        producers = [each for each in self.slices if each.name in self.producers]
        return round_to // math.gcd(round_to, min(each.index.shape[1] for each in producers))


@dataclass(frozen=True, eq=False)
class Channels(Mapping[str, ChannelGroup]):
    """The groups of a model whose channels can be removed, by name, and why others cannot.

    Args:
        groups: Those whose removal was tried and proved to equal masking.
        excluded: Name of a group or layer -> why its channels stay.
    """

    groups: tuple[ChannelGroup, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ChannelGroup:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    def to_masks(self, kept: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Masks:
        """Masks of all parameters in which channels lie: a removed channel is pruned in each of them.

        Args:
            kept: Group name -> (num_channels,) booleans.
            parameters: Name -> tensor, for shapes and devices; buffers are not masked.
        """
        masks: dict[str, Tensor] = {}
        for group in self.groups:
            for each in group.slices:
                if each.name not in parameters:
                    continue
                like = parameters[each.name]
                mask = masks.setdefault(
                    each.name, torch.ones(like.shape, dtype=torch.bool, device=like.device)
                )
                gone = each.index[~kept[group.name].to(each.index.device)].flatten().to(like.device)
                mask.index_fill_(each.dim, gone, False)
        return Masks({name: masks[name] for name in parameters if name in masks})

    def kept(self, masks: Mapping[str, Tensor]) -> Kept:
        """Which channels stay: all but those that every one of their masked slices prunes.

        Where none of its slices is masked, a group stays as it is.

        Args:
            masks: Parameter name -> booleans, or the parameters themselves, of which zeros count as pruned.
        """
        return {group.name: _alive(group, masks) for group in self.groups}


def owners(channels: Channels, group_of: Mapping[str, str]) -> dict[str, str]:
    """Group name -> the modality whose layers put its channels out; "shared" if there are several.

    Args:
        channels: The groups.
        group_of: Parameter name -> its modality or "shared".
    """
    of = {name: {group_of[producer] for producer in group.producers} for name, group in channels.items()}
    return {name: own.pop() if len(own) == 1 else SHARED for name, own in of.items()}


def _alive(group: ChannelGroup, masks: Mapping[str, Tensor]) -> Tensor:
    masked = [each for each in group.slices if each.name in masks]
    if not masked:
        return torch.ones(group.num_channels, dtype=torch.bool)
    alive = [reduce_channels(masks[each.name] != 0, each).cpu() > 0 for each in masked]
    return torch.stack(alive).any(0)


def reduce_channels(tensor: Tensor, where: Slice) -> Tensor:
    """Sum of a tensor over all but its channels: (num_channels,), in float64."""
    rows = tensor.transpose(0, where.dim).flatten(1) if tensor.ndim > 1 else tensor[:, None]
    sums = rows.sum(1, dtype=torch.float64)
    return sums[where.index.to(sums.device)].sum(1)
