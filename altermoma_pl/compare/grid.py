"""The cells of a comparison, and where their results lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from filelock import FileLock

from altermoma_pl.compare.benchmark import Benchmark, Method, Values, identity
from altermoma_pl.mask.top_k import check_sparsity

VALUES = "values.json"


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a method, a sparsity and a seed."""

    seed: int
    sparsity: float
    method: str

    def __str__(self) -> str:
        return f"{self.method} at sparsity {self.sparsity:g}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """Criteria x sparsities x seeds.

    Args:
        benchmark: The problem.
        methods: Name -> method, with every option set.
        sparsities: Shares of zeros among prunable weights.
        seeds: Each has a dense model of its own.
        threads: CPU threads of one run. Sums depend on it in the last bits, so it belongs to a result.

    Raises:
        ValueError: If something is missing, out of range, given twice, or has no telling `repr`.
    """

    benchmark: Benchmark
    methods: Mapping[str, Method]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("methods", "sparsities", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} are empty: nothing to compare")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} hold a value twice: {list(values)}")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be 0 or more, got {list(self.seeds)}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if not self.benchmark.metrics:
            raise ValueError(f"{type(self.benchmark).__name__} names no metrics: there is nothing to compare")
        for thing in (self.benchmark, *self.methods.values()):
            identity(thing)

    @property
    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that a shard needs few dense models."""
        return [Cell(*run) for run in product(self.seeds, self.sparsities, self.methods)]

    def shard(self, shard: str) -> list[Cell]:
        """Those of part i, from 1, of n parts of about the same size: `"2/8"`.

        Raises:
            ValueError: If it is not `i/n` with 1 <= i <= n.
        """
        index, _, count = shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"shard must be i/n with 1 <= i <= n, for example 2/8, got {shard!r}")
        first, last = (i * len(self.cells) // int(count) for i in (int(index) - 1, int(index)))
        return self.cells[first:last]

    def dense_key(self, seed: int) -> str:
        """Name of the dense model of a seed: equal for equal benchmarks, in any comparison."""
        return f"seed{seed}-{_digest(identity(self.benchmark), seed, self.threads)}"

    def cell_key(self, cell: Cell) -> str:
        """Name of a cell's result: changes with all that the result depends on, and not with names."""
        method = self.methods[cell.method]
        digest = _digest(self.dense_key(cell.seed), identity(method), float(cell.sparsity))
        return f"{type(method.criterion).__name__}-{cell.sparsity:g}-seed{cell.seed}-{digest}"


class Store:
    """Results on disk. A folder or file that has its final name is complete: it was renamed into place.

    Args:
        root: Folder of the comparison, shared by all of its shards.
        dense: Folder of dense models, which other comparisons may share; None for one in `root`.
    """

    def __init__(self, root: Path, dense: Path | None = None) -> None:
        self.root = root
        # Absolute, for workers that start in another folder.
        self._dense, self._cells = (dense or root / "dense").absolute(), (root / "cells").absolute()

    def dense(self, grid: Grid, seed: int) -> Path:
        """Folder of the dense model, which is trained if it is not there; others wait meanwhile."""
        folder = self._dense / grid.dense_key(seed)
        self._dense.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # the system releases it even if this process is killed
            if not folder.is_dir():
                temporary = folder.with_name(f".{folder.name}")
                shutil.rmtree(temporary, ignore_errors=True)  # what a training left that failed or was killed
                temporary.mkdir()
                (temporary / VALUES).write_text(_to_text(grid.benchmark.train_dense(seed, temporary)))
                temporary.rename(folder)
        return folder

    def dense_values(self, grid: Grid, seed: int) -> Values | None:
        """What was measured of a dense model, if it is there."""
        return _read(self._dense / grid.dense_key(seed) / VALUES)

    def values(self, grid: Grid, cell: Cell) -> Values | None:
        """What was measured in a cell, if it is done."""
        return _read(self._cells / f"{grid.cell_key(cell)}.json")

    def save(self, grid: Grid, cell: Cell, values: Values) -> None:
        """Keep what was measured in a cell."""
        write_whole(self._cells / f"{grid.cell_key(cell)}.json", _to_text(values))

    def missing(self, grid: Grid) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in grid.cells if self.values(grid, cell) is None]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _to_text(values: Values) -> str:
    """As text; `float` is for tensors and numpy's numbers, which metrics like to return."""
    return json.dumps({name: float(value) for name, value in values.items()}, indent=1) + "\n"


def _read(path: Path) -> Values | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
