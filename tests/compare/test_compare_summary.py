"""Tables of made-up values, to the letter."""

import csv
import io
import math
from dataclasses import replace

import pytest

from altermoma_pl.compare import Estimate, Summary
from altermoma_pl.compare.grid import Store
from altermoma_pl.report.tables import Table
from tests.helpers.summaries import FIRST, summary
from tests.helpers.toy import strict_json

MARKDOWN = [
    r"""**iou at 90% sparsity, higher is better**

| method | iou | of dense | ours_1 better by | camera dropped |
| --- | ---: | ---: | ---: | ---: |
| dense | 1.000 ± 0.000 |  |  | 0.500 |
| ours_1 | 0.600 ± 1.271 | 0.600 |  | 0.250 |
| a\|b [paper] | 0.500 ± 1.271 | 0.500 | +0.100 [+0.100, +0.100] | 0.250 |
""",
    r"""**loss at 90% sparsity, lower is better**

| method | loss | ours_1 better by |
| --- | ---: | ---: |
| ours_1 | 1.500 ± 6.353 |  |
| a\|b [paper] | 2.000 ± 6.353 | +0.500 [+0.500, +0.500] |
""",
    r"""**Kept shares at 90% sparsity, means over seeds**

| method | kept camera | kept shared |
| --- | ---: | ---: |
| ours_1 | 0.050 | 0.200 |
| a\|b [paper] | 0.050 | 0.200 |
""",
]
LATEX = r"""% iou at 90% sparsity, higher is better
\begin{tabular}{lrrrr}
\toprule
method & iou & of dense & ours\_1 better by & camera dropped \\
\midrule
dense & 1.000 $\pm$ 0.000 &  &  & 0.500 \\
ours\_1 & 0.600 $\pm$ 1.271 & 0.600 &  & 0.250 \\
a|b [paper] & 0.500 $\pm$ 1.271 & 0.500 & +0.100 [+0.100, +0.100] & 0.250 \\
\bottomrule
\end{tabular}
"""


def test_markdown():
    assert [table.to_markdown() for table in summary().tables()] == MARKDOWN


def test_latex():
    assert summary().tables()[0].to_latex() == LATEX


def test_latex_escapes_its_characters():
    table = Table("t", (r"_%&$#{}~^\ ",), ())
    expected = r"\_\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}  \\"
    assert table.to_latex().splitlines()[3] == expected


def test_a_terminal_shows_every_cell_as_it_is():
    for table in summary().tables():
        text = table.to_text(120)
        assert all(cell in text for row in (table.header, *table.rows) for cell in row)
        assert text.split("┏")[0].split() == table.title.split()


def test_print_does_not_break_lines_in_a_log_file(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    summary().print()
    lines = capsys.readouterr().out.splitlines()
    assert any("a|b [paper]" in line and "+0.100 [+0.100, +0.100]" in line for line in lines)
    assert any("Seconds of one run" in line for line in lines)


def test_lower_is_better_flips_the_sign():
    found = summary()
    assert found.advantage("a|b [paper]", 0.9, "iou").mean == pytest.approx(0.1)
    assert found.advantage("a|b [paper]", 0.9, "loss").mean == pytest.approx(0.5)
    assert replace(found, reference="a|b [paper]").advantage("ours_1", 0.9, "loss").mean == pytest.approx(
        -0.5
    )


def test_share_of_dense():
    found = summary()
    halved = replace(found, dense={0: {"iou": 0.5}, 1: {"iou": 1.0}})
    assert halved.share_of_dense("ours_1", 0.9, "iou") == pytest.approx((0.5 / 0.5 + 0.7) / 2)
    for dense in ({0: {"iou": 0.0}, 1: {"iou": 1.0}}, {0: {}, 1: {"iou": 1.0}}):
        assert math.isnan(replace(found, dense=dense).share_of_dense("ours_1", 0.9, "iou"))
    assert replace(found, dense={0: {}, 1: {"iou": 1.0}}).dense_estimate("iou") is None


def test_times_stand_in_the_table_of_costs_alone():
    found = summary()
    assert found.cost_table().rows == (("ours_1", "0.50", "2.50"), ("a|b [paper]", "0.50", "2.50"))
    texts = [*(table.to_markdown() for table in found.tables()), found.to_csv(), found.to_json()]
    assert not [text for text in texts if "seconds" in text]


def test_csv_gives_the_values_back():
    found = summary()
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    cells = {(r["method"], float(r["sparsity"]), int(r["seed"]), r["name"]): float(r["value"]) for r in rows}
    assert len(cells) == len(rows) == 2 * 2 + 4 * 6
    assert cells["dense", 0.0, 1, "iou/camera_dropped"] == 0.5
    for cell, values in found.values.items():
        for name in ("iou", "loss", "sparsity", "kept/camera"):
            assert cells[cell.method, cell.sparsity, cell.seed, name] == values[name]


def test_json_is_strict_and_complete():
    found = strict_json(summary(seeds=(0,), loss=math.nan).to_json())
    assert found["reference"] == "ours_1"
    assert found["dense"]["iou"] == {"mean": 1.0, "half_width": None, "num_seeds": 1}
    assert len(found["results"]) == 2 * 5
    iou, loss = found["results"][5:7]
    assert iou["advantage"]["mean"] == pytest.approx(0.1)
    del iou["advantage"]
    assert iou == {
        "method": "a|b [paper]", "sparsity": 0.9, "name": "iou", "mean": 0.4, "half_width": None,
        "num_seeds": 1, "share_of_dense": 0.4,
    }  # fmt: skip
    assert loss["mean"] is None
    assert loss["share_of_dense"] is None


def test_what_one_method_alone_measures_is_left_empty_for_the_others():
    found = summary()
    more = {cell: v | ({"extra": 1.0} if cell.method == "ours_1" else {}) for cell, v in found.values.items()}
    table = replace(found, values=more).tables()[-1]
    assert table.header[-1] == "extra"
    assert [row[-1] for row in table.rows] == ["1.000", ""]


def test_a_diverged_run_shows_as_nan_and_breaks_nothing(tmp_path):
    found = summary(iou=math.inf)
    assert found.tables()[0].rows[1][1:4] == ("nan", "", "")
    assert found.tables()[0].rows[2][1:4] == ("nan", "", "nan")
    found.save(tmp_path)


def test_save_writes_every_file(tmp_path):
    summary().save(tmp_path)
    names = {"tables.md", "tables.tex", "cost.md", "results.csv", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "tables.md").read_text() == "\n".join(MARKDOWN)
    assert (tmp_path / "cost.md").read_text().startswith("**Seconds of one run**")


def stored(tmp_path, found, without=()):
    store = Store(tmp_path)
    for cell, values in found.values.items():
        if cell not in without:
            store.save(found.grid, cell, values)
    return store


def test_results_that_are_missing_are_named(tmp_path, monkeypatch):
    found = summary()
    store = stored(tmp_path, found, without=[FIRST])
    with pytest.raises(
        ValueError, match=r"^3 results are missing, the first is that of the dense model of seed 0$"
    ):
        Summary.of(found.grid, store, "ours_1")
    monkeypatch.setattr(Store, "dense_values", lambda self, grid, seed: found.dense[seed])
    with pytest.raises(
        ValueError, match=r"^1 results are missing, the first is that of ours_1 at sparsity 0.9, seed 0$"
    ):
        Summary.of(found.grid, store, "ours_1")
    store.save(found.grid, FIRST, found.values[FIRST])
    assert Summary.of(found.grid, store, "ours_1") == found


def test_a_promised_metric_must_be_measured(tmp_path, monkeypatch):
    found = summary()
    store = stored(tmp_path, found)
    store.save(found.grid, FIRST, {"iou": 1.0, "sparsity": 0.9})
    monkeypatch.setattr(Store, "dense_values", lambda self, grid, seed: found.dense[seed])
    message = r"^ours_1 at sparsity 0.9, seed 0 measured \['iou', 'sparsity'\], but not 'loss' as promised$"
    with pytest.raises(ValueError, match=message):
        Summary.of(found.grid, store, "ours_1")


def test_estimates_are_over_seeds():
    assert summary().estimate("ours_1", 0.9, "iou") == Estimate.of([0.5, 0.7])
