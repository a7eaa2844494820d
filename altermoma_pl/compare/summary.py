"""What a comparison found: tables as text, Markdown and LaTeX, csv and json."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from altermoma_pl.compare.benchmark import Values
from altermoma_pl.compare.grid import Cell, Grid, Store, write_whole
from altermoma_pl.compare.statistics import Estimate, paired_difference

SECONDS = "seconds/"
KEPT = "kept/"
_WIDE = 200  # columns where there is no terminal: tables take what they need
_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "_%&$#{}"}
    | {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True)
class Sheet:
    """A table: title, header, and rows as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=Text(self.title), title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = ("---", *["---:"] * (len(self.header) - 1))
        rows = ([cell.replace("|", r"\|") for cell in row] for row in (self.header, rule, *self.rows))
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def latex(self) -> str:
        """For a paper: a `tabular` with booktabs' rules."""
        rows = ([cell.translate(_LATEX) for cell in row] for row in (self.header, *self.rows))
        head, *body = (" & ".join(row) + r" \\" for row in rows)
        columns = "l" + "r" * (len(self.header) - 1)
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


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

    def over_seeds(self, method: str, sparsity: float, name: str) -> list[float]:
        """The values of one quantity, one for each seed; NaN where it was not measured."""
        cells = (Cell(seed, sparsity, method) for seed in self.grid.seeds)
        return [self.values[cell].get(name, math.nan) for cell in cells]

    def estimate(self, method: str, sparsity: float, name: str) -> Estimate:
        """Mean over seeds with its interval."""
        return Estimate.of(self.over_seeds(method, sparsity, name))

    def advantage(self, method: str, sparsity: float, name: str) -> Estimate:
        """How much better the reference is than a method, over paired seeds; positive is better."""
        sign = -1 if self.grid.benchmark.metrics.get(name) == "lower" else 1
        ours = [sign * v for v in self.over_seeds(self.reference, sparsity, name)]
        return paired_difference(ours, [sign * v for v in self.over_seeds(method, sparsity, name)])

    def dense_estimate(self, name: str) -> Estimate | None:
        """Of the dense models, if that was measured of them."""
        found = [values[name] for values in self.dense.values() if name in values]
        return Estimate.of(found) if len(found) == len(self.dense) else None

    def share_of_dense(self, method: str, sparsity: float, name: str) -> float:
        """Mean over seeds of a metric as a share of the dense model's; NaN where that is unknown or 0."""
        pruned = self.over_seeds(method, sparsity, name)
        dense = [self.dense[seed].get(name, math.nan) for seed in self.grid.seeds]
        return sum(p / d if d else math.nan for p, d in zip(pruned, dense, strict=True)) / len(pruned)

    @cached_property
    def other_names(self) -> list[str]:
        """What was measured beside the metrics, the sparsity and the time."""
        names = dict.fromkeys(name for values in self.values.values() for name in values)
        skipped = {*self.grid.benchmark.metrics, "sparsity"}
        return [name for name in names if name not in skipped and not name.startswith(SECONDS)]

    def conditions(self, metric: str) -> list[str]:
        """Names under which a metric was measured in other conditions, such as `miou/camera_dropped`."""
        return [name for name in self.other_names if name.startswith(f"{metric}/")]

    def sheets(self) -> list[Sheet]:
        """The tables of results: they repeat exactly, which times do not."""
        grid = self.grid
        sheets = [self._metric_sheet(name, s) for name in grid.benchmark.metrics for s in grid.sparsities]
        return sheets + [self._detail_sheet(sparsity) for sparsity in grid.sparsities]

    def cost_sheet(self) -> Sheet:
        """Seconds of a run, mean over sparsities and seeds."""
        names = ("seconds/scoring", "seconds/all")
        rows = []
        for method in self.grid.methods:
            found = [v for cell, v in self.values.items() if cell.method == method]
            rows.append((method, *(f"{sum(v[n] for v in found) / len(found):.2f}" for n in names)))
        return Sheet("Seconds of one run", ("method", "scoring", "all"), tuple(rows))

    def print(self) -> None:
        """Show the tables."""
        console = Console(width=shutil.get_terminal_size(fallback=(_WIDE, 24)).columns)
        for sheet in (*self.sheets(), self.cost_sheet()):
            console.print(sheet.rich())

    def save(self, folder: Path) -> None:
        """Write tables.{md,tex}, results.csv, summary.json and cost.md."""
        sheets = self.sheets()
        write_whole(folder / "tables.md", "\n".join(sheet.markdown() for sheet in sheets))
        write_whole(folder / "tables.tex", "\n".join(sheet.latex() for sheet in sheets))
        write_whole(folder / "cost.md", self.cost_sheet().markdown())
        write_whole(folder / "results.csv", self.to_csv())
        write_whole(folder / "summary.json", self.to_json())

    def to_csv(self) -> str:
        """One line for each number: method, sparsity, seed, name, value; times left out."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("method", "sparsity", "seed", "name", "value"))
        runs = [(("dense", 0.0, seed), values) for seed, values in self.dense.items()]
        runs += [((cell.method, cell.sparsity, cell.seed), values) for cell, values in self.values.items()]
        for run, values in runs:
            writer.writerows((*run, n, v) for n, v in values.items() if not n.startswith(SECONDS))
        return text.getvalue()

    def to_json(self) -> str:
        """Every estimate, and the advantage of the reference in each metric; null for what is not finite."""
        names = dict.fromkeys(
            n for values in self.dense.values() for n in values if not n.startswith(SECONDS)
        )
        found = ((name, self.dense_estimate(name)) for name in names)
        dense = {name: _finite(asdict(estimate)) for name, estimate in found if estimate}
        content = {"reference": self.reference, "dense": dense, "results": list(self._entries())}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _entries(self) -> Iterator[dict[str, Any]]:
        for sparsity in self.grid.sparsities:
            for method in self.grid.methods:
                for name in (*self.grid.benchmark.metrics, *self.other_names):
                    entry = {"method": method, "sparsity": sparsity, "name": name}
                    entry |= _finite(asdict(self.estimate(method, sparsity, name)))
                    if name in self.grid.benchmark.metrics:
                        entry["share_of_dense"] = _number(self.share_of_dense(method, sparsity, name))
                        entry["advantage"] = _finite(asdict(self.advantage(method, sparsity, name)))
                    yield entry

    def _metric_sheet(self, metric: str, sparsity: float) -> Sheet:
        """Mean and interval, share of dense, advantage of the reference, and means by condition."""
        dense, conditions = self.dense_estimate(metric), self.conditions(metric)
        title = f"{metric} at {percent(sparsity)} sparsity, {self.grid.benchmark.metrics[metric]} is better"
        labels = map(condition_label, conditions)
        header = ("method", metric, *(["of dense"] if dense else []), f"{self.reference} better by", *labels)
        rows = []
        if dense:
            rows.append(("dense", dense.text(), "", "", *(_cell(self._dense_mean(n)) for n in conditions)))
        for method in self.grid.methods:
            share = [_cell(self.share_of_dense(method, sparsity, metric))] if dense else []
            ahead = "" if method == self.reference else self.advantage(method, sparsity, metric).interval()
            means = (_cell(self.estimate(method, sparsity, name).mean) for name in conditions)
            rows.append((method, self.estimate(method, sparsity, metric).text(), *share, ahead, *means))
        return Sheet(title, header, tuple(rows))

    def _detail_sheet(self, sparsity: float) -> Sheet:
        """Kept shares, and what else is no metric."""
        shown = {name for metric in self.grid.benchmark.metrics for name in self.conditions(metric)}
        names = [name for name in self.other_names if name not in shown]
        header = ("method", *(name.replace("_", " ").replace("/", " ") for name in names))
        rows = [
            (method, *(_cell(self.estimate(method, sparsity, name).mean) for name in names))
            for method in self.grid.methods
        ]
        return Sheet(f"Kept shares at {percent(sparsity)} sparsity, means over seeds", header, tuple(rows))

    def _dense_mean(self, name: str) -> float:
        found = self.dense_estimate(name)
        return found.mean if found else math.nan


def condition_label(name: str) -> str:
    """`miou/camera_dropped` -> `camera dropped`."""
    return name.rpartition("/")[2].replace("_", " ")


def percent(sparsity: float) -> str:
    """0.975 -> `97.5%`."""
    return f"{100 * sparsity:g}%"


def _cell(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _number(value: float) -> float | None:
    """Strict json knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
