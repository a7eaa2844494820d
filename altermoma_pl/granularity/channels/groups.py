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
    """Where the channels of a group lie in one tensor: which positions along which of its dimensions.

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
    """Coupled channels: those that layers share, so that a channel leaves all of them or none.

    The c-th of all slices is one channel: rows of the layers that put it out, entries of norms and biases,
    columns of the layers that read it. What else is called a group in torch, the groups of a convolution or
    of an optimizer's parameters, is not meant.

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
        # A head, or a channel of a grouped convolution, is several rows of the weight. The least, since a
        # weight that puts channels out may read them as well, several inputs of each.
        producers = [each for each in self.slices if each.name in self.producers]
        return round_to // math.gcd(round_to, min(each.index.shape[1] for each in producers))


@dataclass(frozen=True, eq=False)
class Channels(Mapping[str, ChannelGroup]):
    """All groups of a model whose channels can be removed, by name, and why other channels cannot.

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
                like = parameters.get(each.name)
                if like is not None:
                    whole = torch.ones(like.shape, dtype=torch.bool, device=like.device)
                    gone = each.index[~kept[group.name].to(each.index.device)].flatten()
                    masks.setdefault(each.name, whole).index_fill_(each.dim, gone.to(like.device), False)
        return Masks({name: masks[name] for name in parameters if name in masks})

    def kept(self, masks: Mapping[str, Tensor]) -> Kept:
        """Which channels stay: all but those that every one of their masked slices prunes.

        Where none of its slices is masked, a group stays as it is.

        Args:
            masks: Parameter name -> booleans, or the parameters themselves, of which zeros count as pruned.
        """
        kept = Kept()
        for group in self.groups:
            masked = [each for each in group.slices if each.name in masks]
            # Of any slice: a channel that one layer has zeros for is still computed by the others.
            alive = [reduce_channels(masks[each.name] != 0, each).cpu() > 0 for each in masked]
            whole = torch.ones(group.num_channels, dtype=torch.bool)
            kept[group.name] = torch.stack(alive).any(0) if alive else whole
        return kept


def owners(channels: Channels, group_of: Mapping[str, str]) -> dict[str, str]:
    """Group name -> the modality, by parameter name, of its producers; "shared" if there are several."""
    of = {name: {group_of[producer] for producer in group.producers} for name, group in channels.items()}
    return {name: own.pop() if len(own) == 1 else SHARED for name, own in of.items()}


def reduce_channels(tensor: Tensor, where: Slice) -> Tensor:
    """Sum of a tensor over all but its channels: (num_channels,), in float64."""
    rows = tensor.transpose(0, where.dim).flatten(1) if tensor.ndim > 1 else tensor[:, None]
    sums = rows.sum(1, dtype=torch.float64)
    return sums[where.index.to(sums.device)].sum(1)
