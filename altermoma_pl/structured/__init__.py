"""Whole channels: which are coupled, which stay, and a smaller model without the others."""

from altermoma_pl.structured.finding import find_channels
from altermoma_pl.structured.flops import FlopModel
from altermoma_pl.structured.groups import ChannelGroup, Channels, Kept, Slice, owners, reduce_channels
from altermoma_pl.structured.resizing import Resizing
from altermoma_pl.structured.slimming import Slim, slim
from altermoma_pl.structured.widths import keep_widths

__all__ = [
    "ChannelGroup",
    "Channels",
    "FlopModel",
    "Kept",
    "Resizing",
    "Slice",
    "Slim",
    "find_channels",
    "keep_widths",
    "owners",
    "reduce_channels",
    "slim",
]
