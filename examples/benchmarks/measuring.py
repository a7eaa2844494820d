"""What the scripts that measure costs share: options, timing in turns, the table and its JSON."""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from altermoma_pl.export.costs import measuring as costs


@dataclass(frozen=True)
class Row:
    """One line of a table of costs.

    Args:
        what: What was measured.
        ratios: What it costs as a multiple of what it is compared with, once for each repetition.
        at_most: The target for their median, None if there is none.
        amounts: The same in `unit`, once for each repetition.
        unit: Of `amounts`.
        note: Whatever a reader should know.
    """

    what: str
    ratios: Sequence[float]
    at_most: float | None = None
    amounts: Sequence[float] = field(default_factory=list)
    unit: str = "s"
    note: str = ""

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios)


def options(
    description: str, argv: Sequence[str] | None = None, **defaults: str | float
) -> argparse.Namespace:
    """Flags of a script: `--quick`, `--repeats` (5), `--device`, `--json`, and one for each of `defaults`.

    Args:
        description: Its first line says what the script measures.
        argv: The command line; None for that of the process.
        defaults: Further options and their defaults, which tell their types.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script works")
    parser.add_argument("--repeats", type=int, default=defaults.pop("repeats", 5))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return arguments


def in_turns(
    actions: Mapping[str, Callable[[], object]], repeats: int, times: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each action: for every repetition the median of `times` runs.

    Actions take turns, as in `altermoma_pl.export.costs.measuring`. Each runs once before, not measured.
    """
    taken = costs.in_turns(actions, repeats * times, device=device)
    return {
        name: [statistics.median(values[start : start + times]) for start in range(0, len(values), times)]
        for name, values in taken.items()
    }


def ratios(amounts: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each divided by that of the same repetition."""
    return [amount / base for amount, base in zip(amounts, reference, strict=True)]


def show(title: str, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Print the table, and write the JSON if it was asked for."""
    table = Table("", "median", "spread", "at most", "amount", "note", title=title, title_justify="left")
    for row in rows:
        spread = f"{min(row.ratios):.3f} - {max(row.ratios):.3f}"
        target = "" if row.at_most is None else f"{row.at_most:g}"
        amount = f"{statistics.median(row.amounts):.4g} {row.unit}" if row.amounts else ""
        table.add_row(row.what, f"{row.median:.3f}", spread, target, amount, row.note)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if arguments.json is not None:
        given = {name: value for name, value in vars(arguments).items() if name != "json"}
        content = {
            "title": title,
            "options": given,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "rows": [asdict(row) | {"median": row.median} for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
