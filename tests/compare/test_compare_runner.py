"""`compare`: right results, nothing twice, the same whatever the processes, failures contained."""

import re

import pytest
import torch

from altermoma_pl import AlterMOMACallback, Magnitude, OneShot, Random, Weight
from altermoma_pl.compare import Method, compare
from altermoma_pl.compare.grid import Cell
from tests.helpers.lightning_models import MODALITIES, NUM_WEIGHTS
from tests.helpers.toy import METHODS, OPTIONS, Failing, Toy, notes, tables

ALL_CELLS = [Cell(seed, s, name) for seed in (0, 1) for s in (0.5, 0.75) for name in METHODS]


def run(folder, methods=METHODS, **options):
    return compare(
        Toy(diary=str(folder / "diary")), methods, output_dir=str(folder / "out"), **OPTIONS | options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted comparison: its folder and its summary."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_every_cell_is_run_once_after_one_dense_model_a_seed(whole):
    folder, summary = whole
    expected = ["dense 0", "dense 1"]
    expected += [f"{METHODS[c.method].criterion!r} {c.sparsity} {c.seed}" for c in ALL_CELLS]
    assert notes(folder / "diary") == expected
    assert list(summary.values) == ALL_CELLS
    assert summary.reference == "magnitude"


def test_values_are_those_of_a_run_by_hand(whole, tmp_path):
    _, summary = whole
    benchmark, callback = Toy(), AlterMOMACallback(
        MODALITIES, 0.75, Magnitude(), OneShot(), min_density=0.0, seed=1, figures=False
    )  # fmt: skip
    assert benchmark.train_dense(1, tmp_path) == summary.dense[1]
    by_hand = benchmark.prune(1, tmp_path, callback, 2)
    values = summary.values[Cell(1, 0.75, "magnitude")]
    assert {name: values[name] for name in by_hand} == by_hand
    assert values["sparsity"] == 0.75
    kept = {name: group.kept for name, group in callback.report().groups.items()}
    assert {name: values[f"kept/{name}"] for name in kept} == kept
    counts = [values["kept/camera"] * 56, values["kept/lidar"] * 56, values["kept/shared"] * 8]
    assert sum(counts) == pytest.approx(0.25 * NUM_WEIGHTS)
    assert 0 <= values["seconds/scoring"] < values["seconds/all"]


def test_each_seed_prunes_with_random_numbers_of_its_own(tmp_path, monkeypatch):
    seeds, prune = [], Toy.prune

    def noting(self, seed, folder, callback, num_epochs):
        seeds.append((seed, callback.seed))
        return prune(self, seed, folder, callback, num_epochs)

    monkeypatch.setattr(Toy, "prune", noting)
    run(tmp_path, {"random": METHODS["random"]}, seeds=[2, 4], sparsities=[0.5])
    assert seeds == [(2, 2), (4, 4)]


def test_starting_again_runs_nothing_and_writes_the_same(whole):
    folder, _ = whole
    before, diary = tables(folder / "out"), notes(folder / "diary")
    for name in before:
        (folder / "out" / name).unlink()
    run(folder)
    assert tables(folder / "out") == before
    assert notes(folder / "diary") == diary


def test_a_method_added_later_runs_its_cells_only(whole, tmp_path):
    first = {"magnitude": METHODS["magnitude"]}
    run(tmp_path, first)
    run(tmp_path)
    assert [line.split("(")[0] for line in notes(tmp_path / "diary")][6:] == ["Random"] * 4
    assert tables(tmp_path / "out") == tables(whole[0] / "out")


def test_comparisons_may_share_dense_models(tmp_path):
    shared = str(tmp_path / "dense")
    for name, method in METHODS.items():
        compare(
            Toy(diary=str(tmp_path / "diary")),
            {name: method},
            output_dir=str(tmp_path / name),
            dense_dir=shared,
            **OPTIONS,
        )
        assert not (tmp_path / name / "dense").exists()
    assert [line for line in notes(tmp_path / "diary") if "dense" in line] == ["dense 0", "dense 1"]


def test_a_method_renamed_runs_nothing(tmp_path):
    run(tmp_path, {"magnitude": METHODS["magnitude"]}, seeds=1)
    summary = run(tmp_path, {"ours": METHODS["magnitude"]}, seeds=1)
    assert len(notes(tmp_path / "diary")) == 3
    assert [cell.method for cell in summary.values] == ["ours", "ours"]


def test_two_processes_give_the_same_bytes(whole, tmp_path):
    run(tmp_path, jobs=2)
    assert tables(tmp_path / "out") == tables(whole[0] / "out")
    assert sorted(notes(tmp_path / "diary")) == sorted(notes(whole[0] / "diary"))


def test_shards_do_their_part_and_the_last_makes_the_tables(whole, tmp_path, capsys):
    assert run(tmp_path, shard="1/2") is None
    assert capsys.readouterr().out == "4 of 8 cells are left to other shards.\n"
    assert not (tmp_path / "out" / "tables.md").exists()
    assert [line for line in notes(tmp_path / "diary") if line.startswith("dense")] == ["dense 0"]
    assert run(tmp_path, shard="2/2") is not None
    assert len(notes(tmp_path / "diary")) == 10
    assert tables(tmp_path / "out") == tables(whole[0] / "out")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_method_that_fails_costs_only_its_own_cells(jobs, tmp_path, capsys):
    methods = {"broken": Method(Failing()), **METHODS}
    log = tmp_path / "out" / "failures-1-of-1.txt"
    message = (
        r"^4 of the runs failed, first broken at sparsity 0\.(5|75), seed (0|1): "
        r"ArithmeticError\('no score today'\)\. The others are kept; tracebacks are in " + re.escape(str(log))
    )
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, methods, jobs=jobs)
    assert capsys.readouterr().err.count("failed: broken at sparsity 0.5, seed 0: ArithmeticError") == 1
    assert 'raise ArithmeticError("no score today")' in log.read_text()
    done = len(notes(tmp_path / "diary"))
    assert run(tmp_path) is not None
    assert len(notes(tmp_path / "diary")) == done
    assert not log.exists()


def test_a_dense_model_that_fails_is_tried_once_and_costs_its_seed(tmp_path, monkeypatch):
    train, tried = Toy.train_dense, []

    def failing(self, seed, folder):
        tried.append(seed)
        if seed == 0:
            raise ArithmeticError("diverged")
        return train(self, seed, folder)

    monkeypatch.setattr(Toy, "train_dense", failing)
    with pytest.raises(RuntimeError, match=r"^1 of the runs failed, first dense model of seed 0: Arith"):
        run(tmp_path)
    assert tried == [0, 1]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4
    monkeypatch.undo()
    assert run(tmp_path) is not None


def test_a_process_that_dies_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"unexpectedly terminated.*What was done is kept"):
        run(tmp_path, {"broken": Method(Failing(hard=True))}, seeds=1, jobs=2)


def test_threads_are_those_asked_for_and_restored(tmp_path):
    before = torch.get_num_threads()
    summary = run(tmp_path, {"a": Method(Random())}, seeds=1, sparsities=[0.5], threads=before + 1)
    assert summary.over_seeds("a", 0.5, "threads") == [before + 1]
    assert torch.get_num_threads() == before


def test_a_method_departs_from_the_common_options(tmp_path):
    own = Method(Magnitude(), OneShot(1), num_epochs=3, scope="layer", min_density=0.1, granularity=Weight())
    summary = run(tmp_path, {"own": own, "common": Method(Magnitude())}, seeds=1, sparsities=[0.5])
    assert summary.grid.methods["own"] == own
    assert summary.grid.methods["common"] == Method(Magnitude(), OneShot(), 2, "global", 0.0, "weight")
    assert summary.over_seeds("own", 0.5, "epochs") == [3]
    assert [summary.over_seeds("own", 0.5, f"kept/{group}") for group in MODALITIES] == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "methods are empty: nothing to compare"),
        ({"reference": "snip"}, r"reference 'snip' is no method: the methods are \['magnitude', 'random'\]"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"shard": "3/2"}, "shard must be i/n with 1 <= i <= n, for example 2/8, got '3/2'"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        (
            {"schedule": OneShot(2)},
            r"method 'magnitude': the last event of OneShot\(epoch=2\) is at epoch 2, but there are 2 "
            r"epochs: let the schedule end earlier, or give the method more epochs",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_reference_can_be_chosen(whole):
    assert run(whole[0], reference="random").reference == "random"
    run(whole[0])
