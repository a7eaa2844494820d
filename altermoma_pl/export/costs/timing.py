"""Timing of actions that take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def seconds(action: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """How long it takes, until the device has done it."""
    _wait_for(device)
    started = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - started


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each action, once for every round.

    Args:
        actions: Name -> what to time.
        rounds: How often each runs. Their order is reversed from round to round.
        warm_up: How many rounds go before, not measured, in the given order.
        device: Where the actions compute.
    """
    for _ in range(warm_up):
        for action in actions.values():
            action()
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            taken[name].append(seconds(actions[name], device))
    return taken


def _wait_for(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
