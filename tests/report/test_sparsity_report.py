"""The report: counts by hand, and each of its forms."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch

from altermoma_pl import Masks, SparsityReport
from altermoma_pl.report.sparsity import LayerReport
from tests.helpers.reports import GROUP_OF, LOSSES, MASKS, REPORT


def test_counts():
    assert REPORT.layers == (
        LayerReport("camera.weight", "camera", 4, 1),
        LayerReport("head.weight", "shared", 2, 2),
        LayerReport("lidar.weight", "lidar", 4, 3),
        LayerReport("camera.late.weight", "camera", 2, 1),
    )
    assert [layer.kept for layer in REPORT.layers] == [0.25, 1.0, 0.75, 0.5]
    assert REPORT.groups == {
        "camera": LayerReport("", "camera", 6, 2),
        "shared": LayerReport("", "shared", 2, 2),
        "lidar": LayerReport("", "lidar", 4, 3),
    }
    assert REPORT.total == LayerReport("", "", 12, 7)
    assert REPORT.sparsity == pytest.approx(5 / 12)
    assert REPORT.losses == LOSSES


def test_table_by_hand():
    lines = [" ".join(line.replace("│", " ").split()) for line in REPORT.to_text().splitlines()]
    assert lines[0] == "Kept weights: sparsity 0.4167"
    rows = [line for line in lines if line and line[0].isalpha()]
    assert rows == [
        "Kept weights: sparsity 0.4167",
        "camera all 6 2 0.3333",
        "camera.weight 4 1 0.2500",
        "camera.late.weight 2 1 0.5000",
        "shared all 2 2 1.0000",
        "head.weight 2 2 1.0000",
        "lidar all 4 3 0.7500",
        "lidar.weight 4 3 0.7500",
        *[row for row in rows if row.startswith(("loss", "without"))],
    ]
    assert " ".join(lines).endswith("loss: all 0.5, without camera 1.25")
    assert "modality" in REPORT.to_text()


def test_table_without_losses_and_with_a_title():
    text = SparsityReport.of(MASKS, GROUP_OF).to_text("Pruned")
    assert text.startswith("Pruned: sparsity 0.4167")
    assert "loss" not in text
    assert not text.endswith("\n")


def test_long_names_are_folded_not_cut():
    name = "encoders.camera." + "block." * 20 + "weight"
    report = SparsityReport.of(Masks({name: torch.tensor([True])}), {name: "camera"})
    text = report.to_text(width=60)
    assert max(map(len, text.splitlines())) <= 60
    # The rows between the first cell of the group and the end hold the whole name.
    cells = [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells[1:]) == name


def test_thousands_are_separated():
    masks = Masks({"camera.weight": torch.ones(1234567, dtype=torch.bool)})
    assert "1,234,567" in SparsityReport.of(masks, {"camera.weight": "camera"}).to_text()


def test_json_parses_back():
    assert json.loads(REPORT.to_json()) == {
        "sparsity": REPORT.sparsity,
        "groups": {
            "camera": {"num_weights": 6, "num_kept": 2, "kept": 2 / 6},
            "shared": {"num_weights": 2, "num_kept": 2, "kept": 1.0},
            "lidar": {"num_weights": 4, "num_kept": 3, "kept": 0.75},
        },
        "layers": [
            {"name": "camera.weight", "group": "camera", "num_weights": 4, "num_kept": 1, "kept": 0.25},
            {"name": "head.weight", "group": "shared", "num_weights": 2, "num_kept": 2, "kept": 1.0},
            {"name": "lidar.weight", "group": "lidar", "num_weights": 4, "num_kept": 3, "kept": 0.75},
            {"name": "camera.late.weight", "group": "camera", "num_weights": 2, "num_kept": 1, "kept": 0.5},
        ],
        "losses": LOSSES,
    }


def test_csv_parses_back():
    rows = list(csv.DictReader(io.StringIO(REPORT.to_csv())))
    assert list(rows[0]) == ["name", "group", "num_weights", "num_kept", "kept"]
    parsed = [LayerReport(r["name"], r["group"], int(r["num_weights"]), int(r["num_kept"])) for r in rows]
    assert tuple(parsed) == REPORT.layers
    assert [float(row["kept"]) for row in rows] == [0.25, 1.0, 0.75, 0.5]


def test_parameters_beside_the_layers_count_in_totals_alone():
    shown = replace(REPORT, shown=("camera.weight",), removed={"channels": 0.5, "FLOPs": 0.75})
    text = shown.to_text("Kept", width=150)
    assert ", 0.5000 of the channels removed, 0.7500 of the FLOPs removed" in " ".join(text.split())
    assert "camera.weight" in text
    assert "head.weight" not in text
    assert shown.total == REPORT.total
    assert json.loads(shown.to_json())["removed"] == {"channels": 0.5, "FLOPs": 0.75}
    assert shown.to_csv() == REPORT.to_csv()
