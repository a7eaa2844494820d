"""What a comparison found: means over seeds with their uncertainty, as tables, csv and json."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from scipy.stats import sem, t

from altermoma_pl.compare.benchmark import Values
from altermoma_pl.compare.grid import Cell, Grid, Store, write_whole
from altermoma_pl.report.tables import Table, to_json

SECONDS = "seconds/"
KEPT = "kept/"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval, by Student's t.

    Args:
        mean: NaN if a value is not finite: a run that diverged has no place in a mean.
        half_width: Infinite for one seed, NaN with the mean.
        num_seeds: How many values there are.
    """

    mean: float
    half_width: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of independent values, at least one."""
        count = len(values)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, count)
        if count == 1:
            return cls(values[0], math.inf, count)
        # Not `ttest_1samp`'s interval: scipy warns where all values are equal.
        return cls(fmean(values), float(t.ppf(0.975, count - 1) * sem(values)), count)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    def text(self, digits: int = 3) -> str:
        """`0.567 ± 0.012`, or the mean alone where there is no interval."""
        mean = f"{self.mean:.{digits}f}"
        return f"{mean} ± {self.half_width:.{digits}f}" if math.isfinite(self.half_width) else mean

    def interval(self, digits: int = 3) -> str:
        """`+0.012 [+0.003, +0.021]`, for differences."""
        if math.isnan(self.mean):
            return "nan"
        mean = f"{self.mean:+.{digits}f}"
        if math.isinf(self.half_width):
            return mean
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of ours minus theirs, seed by seed: what the seeds have in common cancels."""
    return Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Summary:
    """All results of a comparison.

    Args:
        grid: What was compared.
        reference: The method that the others are compared with.
        dense: Seed -> what was measured of its dense model.
        values: Cell -> what was measured in it.
    """

    grid: Grid
    reference: str
    dense: Mapping[int, Values]
    values: Mapping[Cell, Values]

    @classmethod
    def of(cls, grid: Grid, store: Store, reference: str) -> Summary:
        """Collect the results.

        Raises:
            ValueError: If a cell is not done, or lacks a metric that the benchmark promises.
        """
        dense = {s: v for s in grid.seeds if (v := store.dense_values(grid, s)) is not None}
        values = {cell: v for cell in grid.cells if (v := store.values(grid, cell)) is not None}
        absent = [f"the dense model of seed {seed}" for seed in grid.seeds if seed not in dense]
        absent += [str(cell) for cell in grid.cells if cell not in values]
        if absent:
            raise ValueError(f"{len(absent)} results are missing, the first is that of {absent[0]}")
        for cell, found in values.items():
            for metric in grid.benchmark.metrics:
                if metric not in found:
                    raise ValueError(f"{cell} measured {sorted(found)}, but not {metric!r} as promised")
        return cls(grid, reference, dense, values)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row for each number: method, sparsity, seed, name, value; without times, which do not repeat."""
        runs = [("dense", 0.0, seed, values) for seed, values in self.dense.items()]
        runs += [(cell.method, cell.sparsity, cell.seed, values) for cell, values in self.values.items()]
        rows = [(*run, *item) for *run, values in runs for item in values.items()]
        frame = pd.DataFrame(rows, columns=["method", "sparsity", "seed", "name", "value"])
        return frame[~frame["name"].str.startswith(SECONDS)]

    def over_seeds(self, method: str, sparsity: float, name: str) -> list[float]:
        """The values of one quantity, one for each seed; NaN where it was not measured."""
        runs = (self.values[Cell(seed, sparsity, method)] for seed in self.grid.seeds)
        return [run.get(name, math.nan) for run in runs]

    def estimate(self, method: str, sparsity: float, name: str) -> Estimate:
        """Mean over seeds with its interval."""
        return Estimate.of(self.over_seeds(method, sparsity, name))

    def advantage(self, method: str, sparsity: float, name: str) -> Estimate:
        """How much better the reference is than a method, over paired seeds; positive is better."""
        ours, theirs = (self.over_seeds(m, sparsity, name) for m in (self.reference, method))
        if self.grid.benchmark.metrics.get(name) == "lower":
            ours, theirs = theirs, ours
        return paired_difference(ours, theirs)

    def dense_estimate(self, name: str) -> Estimate | None:
        """Of the dense models, if that was measured of them."""
        found = [values[name] for values in self.dense.values() if name in values]
        return Estimate.of(found) if len(found) == len(self.dense) else None

    def share_of_dense(self, method: str, sparsity: float, name: str) -> float:
        """Mean over seeds of a metric as a share of the dense model's; NaN where that is unknown or 0."""
        pairs = zip(self.over_seeds(method, sparsity, name), self.grid.seeds, strict=True)
        shares = [value / dense if (dense := self.dense[s].get(name)) else math.nan for value, s in pairs]
        return sum(shares) / len(shares)

    @cached_property
    def other_names(self) -> list[str]:
        """What was measured beside the metrics, the sparsity and the time."""
        names = dict.fromkeys(name for values in self.values.values() for name in values)
        skipped = {*self.grid.benchmark.metrics, "sparsity"}
        return [name for name in names if name not in skipped and not name.startswith(SECONDS)]

    def conditions(self, metric: str) -> list[str]:
        """Names under which a metric was measured in other conditions, such as `miou/camera_dropped`."""
        return [name for name in self.other_names if name.startswith(f"{metric}/")]

    def tables(self) -> list[Table]:
        """The tables of results: they repeat exactly, which times do not."""
        grid = self.grid
        tables = [self._metric_table(name, s) for name in grid.benchmark.metrics for s in grid.sparsities]
        return tables + [self._detail_table(sparsity) for sparsity in grid.sparsities]

    def cost_table(self) -> Table:
        """Seconds of a run, mean over sparsities and seeds."""
        names, sparsities = ("scoring", "all"), self.grid.sparsities
        rows = []
        for method in self.grid.methods:
            times = ([v for s in sparsities for v in self.over_seeds(method, s, SECONDS + n)] for n in names)
            rows.append((method, *(f"{fmean(values):.2f}" for values in times)))
        return Table("Seconds of one run", ("method", *names), tuple(rows))

    def print(self) -> None:
        """Show the tables, whole where there is no terminal."""
        width = shutil.get_terminal_size(fallback=(200, 24)).columns
        for table in (*self.tables(), self.cost_table()):
            sys.stdout.write(table.to_text(width) + "\n")

    def save(self, folder: Path) -> None:
        """Write tables.{md,tex}, results.csv, summary.json and cost.md."""
        tables = self.tables()
        write_whole(folder / "tables.md", "\n".join(table.to_markdown() for table in tables))
        write_whole(folder / "tables.tex", "\n".join(table.to_latex() for table in tables))
        write_whole(folder / "cost.md", self.cost_table().to_markdown())
        write_whole(folder / "results.csv", self.to_csv())
        write_whole(folder / "summary.json", self.to_json())

    def to_csv(self) -> str:
        """One line for each number: method, sparsity, seed, name, value; times left out."""
        return str(self.frame.to_csv(index=False, na_rep="nan", lineterminator="\n"))

    def to_json(self) -> str:
        """Every estimate, and the advantage of the reference in each metric; null for what is not finite."""
        names = self.frame["name"][self.frame["method"] == "dense"].unique()
        found = {name: self.dense_estimate(name) for name in names}
        dense = {name: asdict(estimate) for name, estimate in found.items() if estimate}
        content = {"reference": self.reference, "dense": dense, "results": list(self._entries())}
        return to_json(content, indent=1) + "\n"

    def _entries(self) -> Iterator[dict[str, Any]]:
        for sparsity, method in product(self.grid.sparsities, self.grid.methods):
            for name in (*self.grid.benchmark.metrics, *self.other_names):
                entry = {"method": method, "sparsity": sparsity, "name": name}
                entry |= asdict(self.estimate(method, sparsity, name))
                if name in self.grid.benchmark.metrics:
                    entry["share_of_dense"] = self.share_of_dense(method, sparsity, name)
                    entry["advantage"] = asdict(self.advantage(method, sparsity, name))
                yield entry

    def _metric_table(self, metric: str, sparsity: float) -> Table:
        """Mean and interval, share of dense, advantage of the reference, and means by condition."""
        dense, conditions = self.dense_estimate(metric), self.conditions(metric)
        title = f"{metric} at {percent(sparsity)} sparsity, {self.grid.benchmark.metrics[metric]} is better"
        labels = map(condition_label, conditions)
        header = ("method", metric, *(["of dense"] if dense else []), f"{self.reference} better by", *labels)
        rows = []
        if dense:
            means = (_rounded(e.mean) if e else "" for e in map(self.dense_estimate, conditions))
            rows.append(("dense", dense.text(), "", "", *means))
        for method in self.grid.methods:
            share = [_rounded(self.share_of_dense(method, sparsity, metric))] if dense else []
            ahead = "" if method == self.reference else self.advantage(method, sparsity, metric).interval()
            means = (_rounded(self.estimate(method, sparsity, name).mean) for name in conditions)
            rows.append((method, self.estimate(method, sparsity, metric).text(), *share, ahead, *means))
        return Table(title, header, tuple(rows))

    def _detail_table(self, sparsity: float) -> Table:
        """Kept shares, and what else is no metric."""
        shown = {name for metric in self.grid.benchmark.metrics for name in self.conditions(metric)}
        names = [name for name in self.other_names if name not in shown]
        header = ("method", *(name.replace("_", " ").replace("/", " ") for name in names))
        rows = [
            (method, *(_rounded(self.estimate(method, sparsity, name).mean) for name in names))
            for method in self.grid.methods
        ]
        return Table(f"Kept shares at {percent(sparsity)} sparsity, means over seeds", header, tuple(rows))


def condition_label(name: str) -> str:
    """`miou/camera_dropped` -> `camera dropped`."""
    return name.rpartition("/")[2].replace("_", " ")


def percent(sparsity: float) -> str:
    """0.975 -> `97.5%`."""
    return f"{100 * sparsity:g}%"


def _rounded(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""
