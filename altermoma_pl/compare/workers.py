"""Attempts tasks, in this process or in several: one that fails costs nothing but itself."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

Task = Callable[[], object]


@dataclass(frozen=True)
class Failure:
    """An exception: its repr, and its traceback as text."""

    reason: str
    traceback: str


class Workers:
    """A context in which tasks run, with a fixed number of CPU threads each.

    Args:
        jobs: Processes; 1 for this one alone.
        threads: CPU threads of each, set back on exit.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        self._threads, self._before = threads, torch.get_num_threads()
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and generators
        self._pool = ProcessPoolExecutor(jobs, context, _start, (threads,)) if jobs > 1 else None

    def __enter__(self) -> Workers:
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._before)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def attempt(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Failure | None]]:
        """The name of each task as it is done, with what went wrong.

        Args:
            tasks: Name -> what to call; must be picklable for several processes.
        """
        if self._pool is None:
            for name, task in tasks.items():
                yield name, _attempt(task)
            return
        futures = {self._pool.submit(_attempt, task): name for name, task in tasks.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _attempt(task: Task) -> Failure | None:
    try:
        with _quiet():
            task()
    except Exception as error:
        return Failure(repr(error), traceback.format_exc())
    return None


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tables, hints and warnings of hundreds of short runs would hide the progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
