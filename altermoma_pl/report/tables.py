"""Tables of text for a terminal, a page or a paper; records as csv and json."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Console
from rich.text import Text

_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "_%&$#{}"}
    | {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True)
class Table:
    """A title, a header, and rows of text as long as the header.

    Args:
        title: Above the table.
        header: Names of the columns.
        rows: Cells, already text.
        num_labels: Columns from the left that hold names: aligned left, folded where a terminal is narrow.
        caption: Below the table.
        sections: Rows, by their number from 0, above which a terminal shows a rule.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1
    caption: str = ""
    sections: tuple[int, ...] = ()

    def __rich__(self) -> rich.table.Table:
        """For a terminal: `rich.print(table)`."""
        table = rich.table.Table(title=Text(self.title), title_justify="left", caption_justify="left")
        table.caption = Text(self.caption) if self.caption else None
        for index, name in enumerate(self.header):
            if index < self.num_labels:
                table.add_column(Text(name), overflow="fold")
            else:
                table.add_column(Text(name), justify="right")
        for index, row in enumerate(self.rows):
            if index in self.sections:
                table.add_section()
            table.add_row(*map(Text, row))
        return table

    def to_text(self, width: int | None = None) -> str:
        """The table as plain text, as wide as the terminal (110 columns where there is none) unless told."""
        columns = width or shutil.get_terminal_size(fallback=(110, 24)).columns
        console = Console(file=io.StringIO(), width=columns, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def to_markdown(self) -> str:
        """The table for a page."""
        rule = tuple("---" if index < self.num_labels else "---:" for index in range(len(self.header)))
        rows = ([cell.replace("|", r"\|") for cell in row] for row in (self.header, rule, *self.rows))
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def to_latex(self) -> str:
        """The table for a paper: a `tabular` with booktabs' rules."""
        rows = ([cell.translate(_LATEX) for cell in row] for row in (self.header, *self.rows))
        head, *body = (" & ".join(row) + r" \\" for row in rows)
        columns = "l" * self.num_labels + "r" * (len(self.header) - self.num_labels)
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for each record below the names of all fields; empty where a record lacks one, or has None."""
    text = io.StringIO()
    fields = list(dict.fromkeys(field for record in records for field in record))
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_json(content: Any, indent: int = 2) -> str:
    """The content as strict json: null for a number that is not finite."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
