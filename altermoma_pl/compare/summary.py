"""What a comparison found: tables as text, Markdown and LaTeX, csv and json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import altermoma_pl.figures as plotting
from altermoma_pl.compare.benchmark import Values
from altermoma_pl.compare.grid import Cell, Grid, Store, write_whole
from altermoma_pl.compare.statistics import Estimate, paired_difference

SECONDS = "seconds/"
KEPT = "kept/"


@dataclass(frozen=True)
class Sheet:
    """A table: title, header, and rows as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = ("---", *["---:"] * (len(self.header) - 1))
        lines = ("| " + " | ".join(row) + " |" for row in (self.header, rule, *self.rows))
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"

    def latex(self) -> str:
        """For a paper: a `tabular` with booktabs' rules."""
        head, *body = (" & ".join(map(_latex, row)) + r" \\" for row in (self.header, *self.rows))
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
        dense = {seed: store.dense_values(grid, seed) for seed in grid.seeds}
        values = {cell: store.values(grid, cell) for cell in grid.cells}
        absent = [key for key, found in (dense | values).items() if found is None]
        if absent:
            raise ValueError(f"{len(absent)} results are missing, the first is that of {absent[0]}")
        done = {cell: found for cell, found in values.items() if found is not None}
        for metric in grid.benchmark.metrics:
            for cell, found in done.items():
                if metric not in found:
                    raise ValueError(f"{cell} measured {sorted(found)}, but not {metric!r} as promised")
        return cls(grid, reference, {s: v for s, v in dense.items() if v is not None}, done)

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
        """Mean over seeds of a metric as a share of the dense model's; NaN where that is unknown."""
        pruned = self.over_seeds(method, sparsity, name)
        dense = [self.dense[seed].get(name, math.nan) for seed in self.grid.seeds]
        return sum(p / d if d else math.nan for p, d in zip(pruned, dense, strict=True)) / len(pruned)

    @cached_property
    def other_names(self) -> list[str]:
        """What was measured beside the metrics, the sparsity and the time."""
        names = dict.fromkeys(name for values in self.values.values() for name in values)
        skipped = {*self.grid.benchmark.metrics, "sparsity"}
        return [name for name in names if name not in skipped and not name.startswith(SECONDS)]

    def sheets(self) -> list[Sheet]:
        """The tables of results: they repeat exactly, which times do not."""
        metrics = [self._metric_sheet(name) for name in self.grid.benchmark.metrics]
        return metrics + [self._detail_sheet(sparsity) for sparsity in self.grid.sparsities]

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
        console = Console()
        for sheet in (*self.sheets(), self.cost_sheet()):
            console.print(sheet.rich())

    def save(self, folder: Path) -> None:
        """Write tables.{md,tex}, results.csv, summary.json, cost.md and, with matplotlib, figures."""
        sheets = self.sheets()
        write_whole(folder / "tables.md", "\n".join(sheet.markdown() for sheet in sheets))
        write_whole(folder / "tables.tex", "\n".join(sheet.latex() for sheet in sheets))
        write_whole(folder / "cost.md", self.cost_sheet().markdown())
        write_whole(folder / "results.csv", self.to_csv())
        write_whole(folder / "summary.json", self.to_json())
        if plotting.available():
            from altermoma_pl.compare.figures import draw

            plotting.save(draw(self), folder / "figures")

    def to_csv(self) -> str:
        """One line for each number: method, sparsity, seed, name, value; times left out."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("method", "sparsity", "seed", "name", "value"))
        for seed, values in self.dense.items():
            writer.writerows(("dense", 0.0, seed, name, value) for name, value in values.items())
        for cell, values in self.values.items():
            kept = ((n, v) for n, v in values.items() if not n.startswith(SECONDS))
            writer.writerows((cell.method, cell.sparsity, cell.seed, n, v) for n, v in kept)
        return text.getvalue()

    def to_json(self) -> str:
        """Every estimate, and the advantage of the reference in each metric."""
        return json.dumps({"reference": self.reference, "results": list(self._entries())}, indent=1) + "\n"

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

    def _metric_sheet(self, name: str) -> Sheet:
        dense = self.dense_estimate(name)
        direction = self.grid.benchmark.metrics[name]
        title = f"{name}, {direction} is better" + (f"; dense {dense.text()}" if dense else "")
        header = ["method"]
        for sparsity in self.grid.sparsities:
            header += [f"{sparsity:.0%}", *(["of dense"] if dense else []), f"{self.reference} better by"]
        rows = tuple((method, *self._metric_row(method, name, dense)) for method in self.grid.methods)
        return Sheet(title, tuple(header), rows)

    def _metric_row(self, method: str, name: str, dense: Estimate | None) -> Iterator[str]:
        for sparsity in self.grid.sparsities:
            yield self.estimate(method, sparsity, name).text()
            if dense:
                yield f"{self.share_of_dense(method, sparsity, name):.3f}"
            same = method == self.reference
            yield "" if same else self.advantage(method, sparsity, name).interval()

    def _detail_sheet(self, sparsity: float) -> Sheet:
        header = ("method", *(name.replace("_", " ") for name in self.other_names))
        rows = [("dense", *(_cell(self._dense_mean(name)) for name in self.other_names))]
        for method in self.grid.methods:
            means = (self.estimate(method, sparsity, name).mean for name in self.other_names)
            rows.append((method, *map(_cell, means)))
        return Sheet(f"What else was measured at {sparsity:.0%}, means over seeds", header, tuple(rows))

    def _dense_mean(self, name: str) -> float:
        if name.startswith(KEPT):
            return 1.0
        found = self.dense_estimate(name)
        return found.mean if found else math.nan


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _latex(text: str) -> str:
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("&", r"\&")):
        text = text.replace(plain, escaped)
    return text


def _number(value: float) -> float | None:
    """Strict json knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
