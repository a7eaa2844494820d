"""Whole channels: which are coupled, which stay, and a smaller model without the others.

In the order of the work, each step with what it makes:

1. trace (`tracing`): a `Port` is one side of a layer; a `Coupling`, all ports that share channels.
2. lay out (`layouts`): a `Layout` says which positions make one channel; with it a coupling becomes a
   `ChannelGroup`, and each tensor in which its channels lie a `Slice` of it. `declared` makes groups of what
   the user says.
3. prove (`finding`, `trial`): the groups of which half was removed on trial, without a change of the
   outputs, are the model's `Channels`; of all others they say why not.
4. score (`calibration`): one number for each channel.
5. keep (`widths`, `flops`): `Kept`, which channels stay at a share of them or of the FLOPs.
6. remove (`slimming`): a `Resizing` says what stays of each tensor, and `Slim` is the smaller model.
7. rebuild (`rebuilding`): the dense model's code and a checkpoint of the slim one give it again.

"Group" means coupled channels here and nothing else. Only a trial tells the truth: the graph is a guess.
"""

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
