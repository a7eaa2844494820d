"""From an option of a user to a granularity."""

from __future__ import annotations

from altermoma_pl.granularity.base import Granularity
from altermoma_pl.granularity.channels.channel import Channel
from altermoma_pl.granularity.weights import NofM, Weight
from altermoma_pl.mask.n_of_m import Pattern


def parse_granularity(value: str | Granularity) -> Granularity:
    """Strings "weight", "channel" and "N:M" with their defaults, or an object as it is.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, Granularity):
        return value
    if value == "weight":
        return Weight()
    if value == "channel":
        return Channel()
    if isinstance(value, str) and ":" in value:
        pattern = Pattern.parse(value)
        return NofM(pattern.n, pattern.m)
    raise ValueError(
        f"granularity must be 'weight', 'channel', a pattern such as '2:4' (in quotes: YAML reads a number), "
        f"or an object of Weight, NofM or Channel, got {value!r}"
    )
