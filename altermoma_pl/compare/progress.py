"""Shows how far a comparison is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from altermoma_pl.compare.workers import Failure

_SECONDS_BETWEEN_LINES = 30.0


class Watch:
    """A context that follows tasks; it writes to the error stream, which tasks leave alone."""

    def __init__(self) -> None:
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
        self._lines = not console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), *columns, console=console, disable=self._lines
        )

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def follow(
        self, what: str, attempts: Iterable[tuple[str, Failure | None]], done: int, total: int
    ) -> dict[str, Failure]:
        """Go through attempts, telling of each; name -> failure of those that failed.

        Args:
            what: What the tasks are, for the bar.
            attempts: Name of a task that is done, and how it failed, if it did.
            done: Tasks that were done before.
            total: Their number with those.
        """
        failures, started = {}, time.monotonic()
        bar = self._progress.add_task(what, completed=done, total=total, left="")
        spoken = started
        self._say(f"{what}: {done} of {total} are done")
        for count, (name, failure) in enumerate(attempts, start=1):
            now = time.monotonic()
            left = time_left(now - started, count, total - done)
            self._progress.update(bar, advance=1, left=left)
            if failure is not None:
                failures[name] = failure
                self._progress.console.print(f"failed: {name}: {failure.reason}")
            if now - spoken >= _SECONDS_BETWEEN_LINES or done + count == total:
                self._say(f"{what}: {done + count} of {total} are done, {left}")
                spoken = now
        return failures

    def _say(self, text: str) -> None:
        if self._lines:
            self._progress.console.print(text)


def time_left(seconds: float, done: int, total: int) -> str:
    """`0:10:00 left`, after `done` of `total` tasks in so many seconds."""
    return f"{timedelta(seconds=round(seconds / done * (total - done)))} left"
