"""Cells, keys and shards; results that are there whole or not at all."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from altermoma_pl import AlterEva, Criterion, Cubic, Magnitude, OneShot, Random
from altermoma_pl.compare import Method
from altermoma_pl.compare.benchmark import identity
from altermoma_pl.compare.grid import Cell, Grid, Store, write_whole
from tests.helpers.toy import Toy

FULL = Method(AlterEva(), Cubic(), 8, "global", 0.01)
GRID = Grid(Toy(), {"a": FULL, "b": replace(FULL, criterion=Magnitude())}, (0.5, 0.9), (0, 1, 2))
CELL = Cell(0, 0.5, "a")


class Unnamed(Criterion):
    def score(self, calibration):
        return {}


class Aimless(Toy):
    metrics = {}  # noqa: RUF012


def test_cells_come_seed_by_seed():
    assert len(GRID.cells) == 12
    assert GRID.cells[:4] == [Cell(0, 0.5, "a"), Cell(0, 0.5, "b"), Cell(0, 0.9, "a"), Cell(0, 0.9, "b")]
    assert str(GRID.cells[3]) == "b at sparsity 0.9, seed 0"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 20])
def test_shards_share_out_the_cells_evenly(count):
    shards = [GRID.shard(f"{index}/{count}") for index in range(1, count + 1)]
    assert [cell for shard in shards for cell in shard] == GRID.cells
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_as_many_shards_as_seeds_have_a_dense_model_each():
    assert [{cell.seed for cell in GRID.shard(f"{index}/3")} for index in (1, 2, 3)] == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "methods are empty: nothing to compare"),
        ({"sparsities": ()}, "sparsities are empty: nothing to compare"),
        ({"seeds": ()}, "seeds are empty: nothing to compare"),
        ({"sparsities": (0.5, 0.5)}, r"sparsities hold a value twice: \[0.5, 0.5\]"),
        ({"seeds": (1, 2, 1)}, r"seeds hold a value twice: \[1, 2, 1\]"),
        ({"sparsities": (1.0,)}, r"sparsity must be a share of zeros in \[0, 1\), got 1.0"),
        ({"seeds": (0, -1)}, r"seeds must be 0 or more, got \[0, -1\]"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"benchmark": Aimless()}, "Aimless names no metrics: there is nothing to compare"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(GRID, **changes)


def test_a_method_must_say_what_it_is():
    with pytest.raises(
        ValueError, match=r"Unnamed object at 0x.*make its class a dataclass, or give it a __repr"
    ):
        replace(GRID, methods={"a": Method(Unnamed())})
    assert identity(Magnitude()) == "Magnitude()"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"min_density": 1.5}, r"min_density must be in \[0, 1\], got 1.5"),
        ({"scope": "all"}, r"scope must be one of \['global', 'modality', 'layer', 'row'\], got 'all'"),
    ],
)
def test_options_of_a_method_are_checked(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Method(Magnitude(), **options)


@pytest.mark.parametrize(
    "change",
    [
        {"criterion": AlterEva(beta=2.0)},
        {"criterion": Random()},
        {"schedule": Cubic(end=5)},
        {"schedule": OneShot()},
        {"num_epochs": 9},
        {"scope": "layer"},
        {"min_density": 0.0},
    ],
)
def test_a_result_is_named_by_all_options_of_its_method(change):
    other = replace(GRID, methods={"a": replace(FULL, **change)})
    assert other.cell_key(CELL) != GRID.cell_key(CELL)
    assert other.dense_key(0) == GRID.dense_key(0)


@pytest.mark.parametrize("change", [{"threads": 2}, {"benchmark": Toy(width=9)}])
def test_a_result_is_named_by_what_its_dense_model_depends_on(change):
    other = replace(GRID, **change)
    assert other.dense_key(0) != GRID.dense_key(0)
    assert other.cell_key(CELL) != GRID.cell_key(CELL)


def test_each_cell_and_each_dense_model_has_a_name_of_its_own():
    assert len({GRID.cell_key(cell) for cell in GRID.cells}) == len(GRID.cells)
    assert len({GRID.dense_key(seed) for seed in GRID.seeds}) == 3
    assert GRID.cell_key(Cell(0, 0.5, "a")) != GRID.cell_key(Cell(0, 0.5000001, "a"))


def test_the_rest_of_the_comparison_and_names_change_no_key():
    other = Grid(Toy(diary="x", pause=1.0), {"other": FULL}, (0.5,), (5, 0))
    assert other.cell_key(Cell(0, 0.5, "other")) == GRID.cell_key(CELL)
    assert GRID.cell_key(CELL).startswith("AlterEva-0.5-seed0-")


@pytest.mark.parametrize(("shard", "first", "last"), [("1/1", 0, 12), ("2/8", 1, 3), ("8/8", 10, 12)])
def test_shard(shard, first, last):
    assert GRID.shard(shard) == GRID.cells[first:last]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/", "/2", "a/2", "1/2/3", "-1/2", "1.0/2", ""])
def test_bad_shards_are_refused(shard):
    with pytest.raises(ValueError, match=r"^shard must be i/n with 1 <= i <= n, for example 2/8, got "):
        GRID.shard(shard)


def test_values_come_back_as_plain_floats(tmp_path):
    store = Store(tmp_path)
    assert store.values(GRID, CELL) is None
    assert len(store.missing(GRID)) == 12
    third = 1 / 3
    store.save(
        GRID, CELL, {"t": torch.tensor(0.5), "n": np.float32(0.25), "i": 2, "x": third, "nan": math.nan}
    )
    values = store.values(GRID, CELL)
    assert {name: values[name] for name in "tnix"} == {"t": 0.5, "n": 0.25, "i": 2.0, "x": third}
    assert math.isnan(values["nan"])
    assert store.missing(GRID) == GRID.cells[1:]


def test_a_dense_model_is_trained_once(tmp_path):
    grid = replace(GRID, benchmark=Toy(diary=str(tmp_path / "diary")))
    store = Store(tmp_path)
    folder = store.dense(grid, 1)
    assert store.dense(replace(grid, sparsities=(0.7,)), 1) == folder
    assert (tmp_path / "diary").read_text() == "dense 1\n"
    assert sorted(path.name for path in folder.iterdir()) == ["dense.pt", "half.pt", "values.json"]
    assert store.dense_values(grid, 1).keys() == {"loss", "loss/camera_dropped"}
    assert store.dense_values(grid, 0) is None


@dataclass(frozen=True)
class Stumbling(Toy):
    works: bool = False

    def train_dense(self, seed, folder):
        assert not any(folder.iterdir())
        (folder / "half.pt").write_text("half of it")
        if not self.works:
            raise ArithmeticError("diverged")
        return {"loss": 1.0}

    def __repr__(self):
        return "Stumbling()"


def test_a_training_that_fails_leaves_nothing_under_its_name(tmp_path):
    store, grid = Store(tmp_path), replace(GRID, benchmark=Stumbling())
    with pytest.raises(ArithmeticError, match="diverged"):
        store.dense(grid, 0)
    folder = tmp_path / "dense" / grid.dense_key(0)
    assert not folder.exists()
    assert store.dense_values(grid, 0) is None
    store.dense(replace(grid, benchmark=Stumbling(works=True)), 0)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_files_are_replaced_whole(tmp_path):
    folder = tmp_path / "made" / "for it"
    write_whole(folder / "file", "old")
    write_whole(folder / "file", "new")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "new")]
