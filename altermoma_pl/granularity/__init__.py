"""What is pruned as one piece: a weight, a block of N:M, or a channel; from scores to masks for each."""

from altermoma_pl.granularity.base import Granularity, Ranking, Sparsity, Traced
from altermoma_pl.granularity.channels.channel import Channel
from altermoma_pl.granularity.parsing import parse_granularity
from altermoma_pl.granularity.weights import NofM, Weight

__all__ = [
    "Channel",
    "Granularity",
    "NofM",
    "Ranking",
    "Sparsity",
    "Traced",
    "Weight",
    "parse_granularity",
]
