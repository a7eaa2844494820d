"""Runs a comparison: every cell that is not done yet, in one process or several."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.compare.benchmark import Benchmark, Method, Values
from altermoma_pl.compare.grid import Cell, Grid, Store, parse_shard
from altermoma_pl.compare.summary import Summary
from altermoma_pl.schedules import Cubic, Schedule
from altermoma_pl.sparsity import Scope

Failure = tuple[Cell, str]


def compare(
    benchmark: Benchmark,
    methods: dict[str, Method],
    sparsities: list[float],
    seeds: int | list[int] = 5,
    reference: str | None = None,
    schedule: Schedule = Cubic(),
    num_epochs: int = 8,
    scope: Scope = "global",
    min_density: float = 0.01,
    output_dir: str = "runs/compare",
    jobs: int = 1,
    threads: int = 1,
    shard: str = "1/1",
) -> Summary | None:
    """Compare methods on a benchmark: methods x sparsities x seeds, from the same dense models.

    Results are kept in `output_dir` as they come. A comparison that was stopped, also by a kill, goes on
    where it was, and ends with the tables of an uninterrupted one. When all cells are done, tables
    and figures are written to `output_dir` and the tables are printed.

    Args:
        benchmark: The problem.
        methods: Name -> criterion, and where the method departs from the options below.
        sparsities: Shares of zeros among prunable weights, in [0, 1).
        seeds: How many, from 0, or which.
        reference: The method that the others are compared with; None for the first.
        schedule: When to prune.
        num_epochs: Length of pruning and fine-tuning.
        scope: Over what weights compete.
        min_density: Share of each tensor that stays whatever its scores.
        output_dir: For dense models, results, tables and figures.
        jobs: Processes at a time on this machine.
        threads: CPU threads of each. Results may depend on it in the last bits, on `jobs` they do not.
        shard: "i/n": do only every n-th cell, for jobs of a cluster that share `output_dir`.

    Returns:
        The summary, or None as long as other shards have cells to do.

    Raises:
        ValueError: If an option is out of range or a schedule does not fit in its epochs.
        RuntimeError: If cells failed; the others are done and kept.
    """
    common = Method(next(iter(methods.values())).criterion, schedule, num_epochs, scope, min_density)
    complete = {name: _completed(method, common) for name, method in methods.items()}
    for name, method in complete.items():
        _check_schedule(name, method)
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    grid = Grid(benchmark, complete, tuple(sparsities), chosen, threads)
    reference = reference or next(iter(complete))
    if reference not in complete:
        raise ValueError(f"reference {reference!r} is no method: the methods are {list(complete)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    index, count = parse_shard(shard)
    store = Store(Path(output_dir))
    failures = _run(grid, store, grid.cells[index - 1 :: count], jobs)
    if failures:
        first, reason = failures[0]
        raise RuntimeError(f"{len(failures)} cells failed, the first is {first}: {reason}")
    left = len(list(store.missing(grid)))
    if left:
        Console().print(f"{left} of {len(grid.cells)} cells are left to other shards.")
        return None
    summary = Summary.of(grid, store, reference)
    summary.save(store.root)
    summary.print()
    return summary


def run_cell(grid: Grid, store: Store, cell: Cell) -> None:
    """Prune, measure, and keep the result."""
    folder = store.dense(grid, cell.seed)
    method = grid.methods[cell.method]
    # Plain options again: those of the callback have types of their own.
    callback = AlterMOMACallback(
        modalities={name: list(patterns) for name, patterns in grid.benchmark.modalities.items()},
        sparsity=cell.sparsity,
        criterion=method.criterion,
        schedule=method.schedule or Cubic(),
        scope=method.scope or "global",
        min_density=method.min_density or 0.0,
        prunable=list(grid.benchmark.prunable),
        seed=cell.seed,
        figures=False,
        store_components=False,
    )
    started = time.perf_counter()
    values = dict(grid.benchmark.prune(cell.seed, folder, callback, method.num_epochs or 1))
    store.save(grid, cell, values | _of_callback(callback, time.perf_counter() - started))


def _of_callback(callback: AlterMOMACallback, seconds: float) -> Values:
    """What every comparison reports: sparsity, kept shares and cost."""
    report = callback.report()
    kept = {f"kept/{name}": total.kept for name, total in report.groups.items()}
    cost = {"seconds/scoring": callback.scoring_seconds, "seconds/all": seconds}
    return {"sparsity": report.sparsity, **kept, **cost}


def _completed(method: Method, common: Method) -> Method:
    options = ("schedule", "num_epochs", "scope", "min_density")
    missing = {name: getattr(common, name) for name in options if getattr(method, name) is None}
    return replace(method, **missing)


def _check_schedule(name: str, method: Method) -> None:
    schedule, epochs = method.schedule, method.num_epochs
    if schedule is not None and epochs is not None and schedule.last_epoch >= epochs:
        raise ValueError(
            f"method {name!r}: the last event of {schedule} is at epoch {schedule.last_epoch}, but there are "
            f"{epochs} epochs: let the schedule end earlier, or give the method more epochs"
        )


def _run(grid: Grid, store: Store, cells: Sequence[Cell], jobs: int) -> list[Failure]:
    """Do what is not done of these cells; which ones failed, and why."""
    todo = [cell for cell in cells if store.values(grid, cell) is None]
    failures = []
    with _progress() as progress:
        bar = progress.add_task("comparing", total=len(cells), completed=len(cells) - len(todo))
        for cell, error in _attempts(grid, store, todo, min(jobs, len(todo))):
            progress.advance(bar)
            if error is not None:
                failures.append((cell, error))
                progress.console.print(f"failed: {cell}: {error}", highlight=False, markup=False)
    return failures


def _attempts(
    grid: Grid, store: Store, cells: Sequence[Cell], jobs: int
) -> Iterator[tuple[Cell, str | None]]:
    """Each cell as it is done, with what went wrong."""
    if jobs <= 1:
        before = torch.get_num_threads()
        torch.set_num_threads(grid.threads)
        try:
            for cell in cells:
                yield cell, _attempt(grid, store, cell)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and generators
    with ProcessPoolExecutor(jobs, context, _start_worker, (grid.threads,)) as pool:
        futures = {pool.submit(_attempt, grid, store, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _attempt(grid: Grid, store: Store, cell: Cell) -> str | None:
    try:
        with _quiet():
            run_cell(grid, store, cell)
    except Exception as error:  # one method that fails must not cost the results of the others
        return repr(error)
    return None


def _start_worker(threads: int) -> None:
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
    """Tables, hints and warnings of hundreds of short runs would hide the progress bar."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
    )
