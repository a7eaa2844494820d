"""From an option of a user to a granularity."""

from __future__ import annotations

import re

from altermoma_pl.granularity.base import Granularity
from altermoma_pl.granularity.channels.channel import Channel
from altermoma_pl.granularity.weights import NofM, Weight


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
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value) if isinstance(value, str) else None
    if found:
        return NofM(int(found[1]), int(found[2]))
    raise ValueError(
        f"granularity must be 'weight', 'channel', N:M such as '2:4' (in quotes: YAML reads 2:4 as 124), "
        f"or an object of Weight, NofM or Channel, got {value!r}"
    )
