"""Whole channels: which are coupled, which stay, and a smaller model without the others."""

from altermoma_pl.granularity.channels.finding import find_channels
from altermoma_pl.granularity.channels.flops import FlopModel, Flops, count_flops
from altermoma_pl.granularity.channels.groups import (
    ChannelGroup,
    Channels,
    Kept,
    Slice,
    owners,
    reduce_channels,
)
from altermoma_pl.granularity.channels.resizing import Resizing
from altermoma_pl.granularity.channels.slimming import Slim, slim
from altermoma_pl.granularity.channels.widths import keep_widths

__all__ = [
    "ChannelGroup",
    "Channels",
    "FlopModel",
    "Flops",
    "Kept",
    "Resizing",
    "Slice",
    "Slim",
    "count_flops",
    "find_channels",
    "keep_widths",
    "owners",
    "reduce_channels",
    "slim",
]
