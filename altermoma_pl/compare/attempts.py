"""Attempts tasks by joblib, here or on a cluster, and shows how far they are: one that fails costs itself."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 30.0
# Random numbers, threads and the output belong to a process: where a backend runs tasks in threads, such as
# Dask's workers by default, they wait for each other.
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Failure:
    """An exception: its repr, and its traceback as text."""

    reason: str
    traceback: str


Attempts = Iterable[tuple[str, Failure | None]]


def attempt(tasks: Mapping[str, Callable[[], object]], jobs: int, threads: int) -> Attempts:
    """The name of each task as it is done, with what went wrong.

    Args:
        tasks: Name -> what to call.
        jobs: Processes; 1 for this one alone. The backend of a cluster goes by the cluster's size.
        threads: CPU threads of each, set back afterwards.

    Raises:
        RuntimeError: If a process died or could not be reached.
    """
    # In batches, the end of a task would be known with that of the last one of its batch.
    options = {"return_as": "generator_unordered", "batch_size": 1}
    parallel = Parallel(jobs, initializer=_end_with, initargs=(os.getpid(),), **options)
    try:
        yield from parallel(delayed(_attempt)(name, task, threads) for name, task in tasks.items())
    except Exception as error:
        raise RuntimeError(
            f"the workers stopped: {error!r}. What was done is kept: mend the cause and start again"
        ) from error


def follow(what: str, attempts: Attempts, done: int, total: int) -> dict[str, Failure]:
    """Go through attempts, telling of each on the error stream; name -> failure of those that failed.

    A terminal has a bar, a log file a line now and then.

    Args:
        what: What the tasks are.
        attempts: Name of a task that is done, and how it failed, if it did.
        done: Tasks that were done before.
        total: Their number with those.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    failures, started = {}, time.monotonic()
    spoken = started
    in_lines = not console.is_terminal
    if in_lines:
        console.print(f"{what}: {done} of {total} are done")
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=in_lines) as progress:
        bar = progress.add_task(what, completed=done, total=total, left="")
        for count, (name, failure) in enumerate(attempts, start=1):
            now = time.monotonic()
            seconds = (now - started) / count * (total - done - count)
            left = f"{timedelta(seconds=round(seconds))} left"
            progress.update(bar, advance=1, left=left)
            if failure is not None:
                failures[name] = failure
                console.print(f"failed: {name}: {failure.reason}")
            due = now - spoken >= _SECONDS_BETWEEN_LINES or done + count == total
            if in_lines and due:
                console.print(f"{what}: {done + count} of {total} are done, {left}")
                spoken = now
    return failures


def _attempt(name: str, task: Callable[[], object], threads: int) -> tuple[str, Failure | None]:
    """Do it quietly: what hundreds of short runs have to say would hide the progress."""
    with _ALONE, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        disabled, num_threads = logging.root.manager.disable, torch.get_num_threads()
        try:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            torch.set_num_threads(threads)
            task()
        except Exception as error:
            return name, Failure(repr(error), traceback.format_exc())
        finally:
            logging.disable(disabled)
            torch.set_num_threads(num_threads)
    return name, None


def _end_with(parent: int) -> None:
    """Let this worker end with its parent: if that is killed, it would wait for work for minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
