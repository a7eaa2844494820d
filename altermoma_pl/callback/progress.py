"""A progress bar while scoring, beside whichever of Lightning's the Trainer shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import SIGTERMException

from altermoma_pl.score.calibration import Progress, no_progress


@contextmanager
def scoring_bar(trainer: Trainer) -> Iterator[Progress]:
    """A bar that restarts with each phase; nothing is shown where the Trainer shows no bar.

    Yields:
        A function of the phase, its batches done and their total, if known. It raises `SIGTERMException`
        after a SIGTERM, which Lightning only notes: who sends it does not wait for the end of an event.
    """
    lightning_bar = trainer.progress_bar_callback
    if isinstance(lightning_bar, RichProgressBar) and lightning_bar.progress is not None:
        bar: _TqdmBar | _RichBar = _RichBar(lightning_bar.progress)
    elif isinstance(lightning_bar, TQDMProgressBar) and lightning_bar.is_enabled:
        bar = _TqdmBar()
    else:
        yield _stoppable(trainer, no_progress)
        return
    try:
        yield _stoppable(trainer, bar.show)
    finally:
        bar.close()


def _stoppable(trainer: Trainer, show: Progress) -> Progress:
    def progress(phase: str, done: int, total: int | None) -> None:
        # One of several processes must not leave the others waiting; Lightning stops them together.
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SIGTERMException
        show(phase, done, total)

    return progress


class _TqdmBar:
    def __init__(self) -> None:
        self._phase = ""
        self._bar: Any = None

    def show(self, phase: str, done: int, total: int | None) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            self._bar = Tqdm(desc=f"Scoring: {phase}", total=total, leave=False, file=sys.stdout)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _RichBar:
    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._phase = ""
        self._task: Any = None

    def show(self, phase: str, done: int, total: int | None) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            # Lightning's columns need a total; infinity is what it uses for an unknown one.
            self._task = self._progress.add_task(
                f"Scoring: {phase}", total=float("inf") if total is None else total
            )
        self._progress.update(self._task, completed=done)
        self._progress.refresh()

    def close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None
