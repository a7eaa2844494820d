"""Runs a comparison: every cell that is not done yet, in one process or several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from joblib import parallel_config
from rich.console import Console

import altermoma_pl.report.figures as figures
from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.compare.attempts import Failure, attempt, follow
from altermoma_pl.compare.benchmark import Benchmark, Method
from altermoma_pl.compare.figures import draw_comparison
from altermoma_pl.compare.grid import Cell, Grid, Store, write_whole
from altermoma_pl.compare.summary import Summary
from altermoma_pl.granularity import Granularity
from altermoma_pl.mask.schedules import Cubic, Schedule
from altermoma_pl.mask.top_k import Scope


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
    granularity: str | Granularity = "weight",
    output_dir: str = "runs/compare",
    dense_dir: str | None = None,
    jobs: int = 1,
    threads: int = 1,
    shard: str = "1/1",
    backend: str | None = None,
    backend_options: dict[str, Any] | None = None,
) -> Summary | None:
    """Compare methods on a benchmark: methods x sparsities x seeds, from the same dense models.

    Results are kept in `output_dir` as they come. A comparison that was stopped, also by a kill, goes on
    where it was, and ends with the tables of an uninterrupted one; what is added later, such as a method,
    is all that runs. Results are found again by their options: after a change of code, take a new folder.
    When all cells are done, tables and figures are written to `output_dir` and the tables are printed.

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
        granularity: What is pruned as one piece: a "weight", "N:M" or a "channel", and sparsities are then
            shares of channels.
        output_dir: For results, tables and figures.
        dense_dir: For dense models; comparisons on the same benchmark may share it. None for a folder
            `dense` in `output_dir`.
        jobs: Processes at a time on this machine.
        threads: CPU threads of each. Results may depend on it in the last bits, on `jobs` they do not.
        shard: "i/n": do only part i, from 1, of n, for jobs of a cluster that share `output_dir`. The one
            that ends last makes the tables.
        backend: What runs the jobs, by joblib's name: "loky" for processes of this machine, "dask" for a
            cluster that sees `output_dir`. None for that of an enclosing `joblib.parallel_config`, or "loky".
        backend_options: Arguments of the backend, such as `scheduler_host` of Dask.

    Returns:
        The summary, or None as long as other shards have cells to do.

    Raises:
        ValueError: If an option is out of range or a schedule does not fit in its epochs.
        RuntimeError: If runs failed; the others are done and kept.
    """
    defaults = {"schedule": schedule, "num_epochs": num_epochs, "scope": scope}
    defaults |= {"min_density": min_density, "granularity": granularity}
    complete = {name: _completed(name, method, defaults) for name, method in methods.items()}
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    grid = Grid(benchmark, complete, tuple(sparsities), chosen, threads)
    reference = reference or next(iter(complete))
    if reference not in complete:
        raise ValueError(f"reference {reference!r} is no method: the methods are {list(complete)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    cells = grid.shard(shard)
    store = Store(Path(output_dir), Path(dense_dir) if dense_dir else None)
    console = Console(highlight=False, soft_wrap=True)
    with parallel_config(backend, **backend_options or {}) if backend else contextlib.nullcontext():
        failures = _run(grid, store, cells, jobs)
    log = store.root / f"failures-{shard.replace('/', '-of-')}.txt"
    log.unlink(missing_ok=True)
    if failures:
        write_whole(log, "\n".join(f"{name}\n{failure.traceback}" for name, failure in failures.items()))
        name, first = next(iter(failures.items()))
        raise RuntimeError(
            f"{len(failures)} of the runs failed, first {name}: {first.reason}. The others are kept; "
            f"tracebacks are in {log}. Mend the cause and start again"
        )
    left = len(store.missing(grid))
    if left:
        console.print(f"{left} of {len(grid.cells)} cells are left to other shards.")
        return None
    summary = Summary.of(grid, store, reference)
    summary.save(store.root)
    if figures.available():
        figures.save(draw_comparison(summary), store.root / "figures")
    summary.print()
    console.print(f"Tables and figures are in {store.root}", markup=False)
    return summary


def run_cell(grid: Grid, store: Store, cell: Cell) -> None:
    """Prune, measure, and keep the result."""
    folder = store.dense(grid, cell.seed)
    options = dict(vars(grid.methods[cell.method]))
    num_epochs = options.pop("num_epochs")
    # Plain collections again: those of a benchmark may be of any type.
    callback = AlterMOMACallback(
        modalities={name: list(patterns) for name, patterns in grid.benchmark.modalities.items()},
        sparsity=cell.sparsity,
        prunable=list(grid.benchmark.prunable),
        seed=cell.seed,
        figures=False,
        store_components=False,
        **options,
    )
    started = time.perf_counter()
    values = dict(grid.benchmark.prune(cell.seed, folder, callback, num_epochs))
    seconds = time.perf_counter() - started
    # What every comparison reports beside what its benchmark measures: sparsity, kept shares and cost.
    report, event = callback.report(), callback.events[-1]
    values |= {"sparsity": report.sparsity}
    values |= {key: event[key] for key in ("channels", "flops") if key in event}
    values |= {f"kept/{name}": total.kept for name, total in report.groups.items()}
    values |= {"seconds/scoring": callback.scoring_seconds, "seconds/all": seconds}
    store.save(grid, cell, values)


def _completed(name: str, method: Method, defaults: Mapping[str, Any]) -> Method:
    """The method with every option set; its schedule must fit in its epochs."""
    missing = {key: value for key, value in defaults.items() if getattr(method, key) is None}
    complete = replace(method, **missing)
    schedule, epochs = complete.schedule, complete.num_epochs
    if schedule is not None and epochs is not None and schedule.last_epoch >= epochs:
        raise ValueError(
            f"method {name!r}: the last event of {schedule} is at epoch {schedule.last_epoch}, but there are "
            f"{epochs} epochs: let the schedule end earlier, or give the method more epochs"
        )
    return complete


def _run(grid: Grid, store: Store, cells: Sequence[Cell], jobs: int) -> dict[str, Failure]:
    """Do what is not done of these cells, dense models first; what failed."""
    seeds = dict.fromkeys(cell.seed for cell in cells)
    absent = [seed for seed in seeds if store.dense_values(grid, seed) is None]
    todo = [cell for cell in cells if store.values(grid, cell) is None]
    dense = {f"dense model of seed {seed}": partial(store.dense, grid, seed) for seed in absent}
    attempts = attempt(dense, jobs, grid.threads)
    failures = follow("dense models", attempts, len(seeds) - len(absent), len(seeds))
    # A dense model that cannot be trained would be tried, in vain, by each of its cells.
    possible = [cell for cell in todo if store.dense_values(grid, cell.seed) is not None]
    pruned = {str(cell): partial(run_cell, grid, store, cell) for cell in possible}
    attempts = attempt(pruned, jobs, grid.threads)
    return failures | follow("cells", attempts, len(cells) - len(todo), len(cells))
