"""Signals and checkpoints at the start of an epoch, where events are."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Lightning only notes the first, the second must stop the event, the third is the loaders'.
_NOT_HELD = {"SIGTERM", "SIGINT", "SIGCHLD"}


@contextmanager
def signals_held() -> Iterator[None]:
    """Handle signals on exit instead of at once, where Python handles them.

    A handler may save a checkpoint, as Lightning's does on SLURM before it puts the job in the queue
    again; inside an event it would save a model with a modality switched off.
    """
    held: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        held.add(number)

    handlers = _handlers() if threading.current_thread() is threading.main_thread() else {}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def resume_with_first_batch(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint that is saved at the start of an epoch, as after an error in an event, resume there.

    Until the first batch Lightning's counts say that all batches are done, those of the epoch before, and
    whoever resumes from them skips the epoch.
    """
    if "loops" not in checkpoint:
        return  # weights alone
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    if epochs["started"] < epochs["ready"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def _handlers() -> dict[int, Any]:
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    names = {int(number): number.name for number in signal.Signals}
    return {int(n): h for n, h in found.items() if callable(h) and names.get(int(n)) not in _NOT_HELD}
