"""Tables and records, to the letter."""

import io
import json
import math

import pytest
from rich.console import Console

from altermoma_pl.report.tables import Table, to_csv, to_json

TABLE = Table(
    "Kept [bold]",
    ("modality", "layer", "kept"),
    (("camera", "all", "0.5"), ("", "a|b_[red]", "0.25"), ("lidar", "all", "1")),
    num_labels=2,
    caption="loss: 1 [of 2]",
    sections=(0, 2),
)


TEXT = """\
Kept [bold]
┏━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━┓
┃ modality ┃ layer     ┃ kept ┃
┡━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━┩
│ camera   │ all       │  0.5 │
│          │ a|b_[red] │ 0.25 │
├──────────┼───────────┼──────┤
│ lidar    │ all       │    1 │
└──────────┴───────────┴──────┘
loss: 1 [of 2]"""


def test_text():
    assert [line.rstrip() for line in TABLE.to_text(width=60).splitlines()] == TEXT.splitlines()


def test_labels_are_folded_where_a_terminal_is_narrow():
    lines = Table("", ("name", "n"), (("abcdefgh", "1"),)).to_text(width=14).splitlines()
    assert [line for line in lines if line.startswith("│")] == ["│ abcdef │ 1 │", "│ gh     │   │"]


def test_a_console_shows_the_same():
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(TABLE)
    assert console.file.getvalue().rstrip() == TABLE.to_text(width=60)


def test_markdown():
    assert TABLE.to_markdown() == (
        "**Kept [bold]**\n\n"
        "| modality | layer | kept |\n"
        "| --- | --- | ---: |\n"
        "| camera | all | 0.5 |\n"
        r"|  | a\|b_[red] | 0.25 |"
        "\n| lidar | all | 1 |\n"
    )


def test_latex():
    assert TABLE.to_latex() == "\n".join(
        [
            "% Kept [bold]",
            r"\begin{tabular}{llr}",
            r"\toprule",
            r"modality & layer & kept \\",
            r"\midrule",
            r"camera & all & 0.5 \\",
            r" & a|b\_[red] & 0.25 \\",
            r"lidar & all & 1 \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def test_latex_escapes_its_characters():
    cells = Table("t", ("±1", r"_%&$#{}", "~^\\"), ()).to_latex().splitlines()[3]
    assert cells == (r"$\pm$1 & \_\%\&\$\#\{\} & \textasciitilde{}\textasciicircum{}\textbackslash{} \\")


def test_csv_has_the_fields_of_all_records():
    records = [{"name": "a", "flops": 2}, {"name": "b, c", "latency": 0.5, "flops": None}]
    assert to_csv(records) == 'name,flops,latency\na,2,\n"b, c",,0.5\n'


def test_json_is_strict():
    text = to_json({"a": [1, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": None, "e": 0.5, "f": True}})
    expected = {"a": [1, None, [None]], "b": {"c": None, "d": None, "e": 0.5, "f": True}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert to_json({"a": 1}, indent=1) == '{\n "a": 1\n}'
