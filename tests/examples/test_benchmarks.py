"""The benchmarks of the examples: planted redundancy, and the names of what the fusion model measures."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from altermoma_pl import AlterMOMACallback, Criterion, Magnitude, OneShot, Random
from altermoma_pl.compare import Method, compare
from altermoma_pl.compare.benchmark import identity
from examples.benchmarks import fusion, selection
from examples.benchmarks.planted import Planted, PlantedModule, PlantedNet

TINY = Planted(width=4, num_steps=3, steps_per_epoch=2)
LOUD = Planted(camera_noise=0.0, lidar_noise=0.0)


def batches(benchmark, seed=0, split=0, num_batches=2):
    return list(benchmark.data(seed, split, num_batches))


def same(first, second):
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_data_repeat_and_differ_by_seed_and_split():
    data = TINY.data(0, 0, 2)
    assert len(data) == 2
    assert same(list(data), list(data))
    assert same(batches(TINY), batches(TINY))
    assert not same(batches(TINY), batches(TINY, seed=1))
    assert not same(batches(TINY), batches(TINY, split=1))
    assert [tuple(tensor.shape) for tensor in batches(TINY)[0]] == [(128, 16)] * 4 + [(128, 8)]


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 1.0])
def test_the_dial_is_a_correlation(redundancy):
    data = replace(LOUD, redundancy=redundancy).data(3, 0, 200)
    camera, _, lidar, _ = (mixing.pinverse() for mixing in data.mixing)
    found = [(x.atanh() @ camera, z.atanh() @ lidar) for x, _, z, _, _ in data]
    ours, theirs = (torch.cat(part).flatten() for part in zip(*found, strict=True))
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) == pytest.approx(redundancy, abs=0.02)
    assert float(theirs.std()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("redundancy", [-0.1, 1.1])
def test_a_dial_out_of_range_is_refused(redundancy):
    with pytest.raises(ValueError, match=rf"^redundancy must be in \[0, 1\], got {redundancy}$"):
        Planted(redundancy=redundancy)


@dataclass(frozen=True)
class Planned(Criterion):
    """One score for the camera's shared weights but the first, which has another; one for all the rest."""

    first: float
    shared: float
    rest: float

    def score(self, calibration):
        scores = {
            name: torch.full_like(weight, self.shared if "camera.shared." in name else self.rest)
            for name, weight in calibration.weights.items()
        }
        scores["net.camera.shared.0.weight"][0, 0] = self.first
        return scores


@pytest.mark.parametrize(
    ("first", "shared", "rest", "expected"),
    [
        (1, 1, 2, 1.0),
        (-300, -300, -200, 1.0),
        (5, 5, 1, 0.0),
        (1, 1, 1, 0.5),
        (3, 1, 2, 1 - 1 / 112),
        (2, 1, 2, 1 - 0.5 / 112),
    ],
)
def test_the_area_by_hand(first, shared, rest, expected):
    """4 * 16 + 4 * 4 + 4 * 8 = 112 weights of each kind; a tie counts half."""
    module = PlantedModule(PlantedNet(width=4), 1e-3, 2, TINY.data(0, 4, 2))
    callback = AlterMOMACallback(dict(TINY.modalities), criterion=Planned(first, shared, rest))
    assert TINY._area(module, 0, callback) == pytest.approx(expected, abs=1e-6)


def test_a_tiny_comparison(tmp_path):
    methods = {"magnitude": Method(Magnitude()), "random": Method(Random())}
    summary = compare(TINY, methods, [0.5], 2, schedule=OneShot(), num_epochs=1, output_dir=str(tmp_path))
    values = next(iter(summary.values.values()))
    assert values.keys() >= {"auc", "loss", "kept/camera", "kept/lidar", "kept/shared"}
    assert summary.dense[0].keys() == {"loss", "loss/camera_alone", "loss/lidar_alone"}
    first, second = summary.over_seeds("random", 0.5, "auc")
    assert first != second
    assert abs(first - 0.5) < 0.2


def test_names_of_the_fusion_benchmark():
    views = {view: {"miou": 0.5} for view in ("both", "LiDAR dropped")}
    assert fusion._values(views) == {"miou": 0.5, "miou/lidar_dropped": 0.5}
    assert fusion._values({"both": {"ap": 0.25}}, "camera_alone") == {"ap/camera_alone": 0.25}


def test_where_scenes_are_cached_changes_no_result():
    assert identity(fusion.Fusion(cache_dir="a")) == identity(fusion.Fusion(cache_dir="b"))
    assert identity(fusion.Fusion(num_train=8)) != identity(fusion.Fusion())


def test_the_fusion_benchmark_trains_and_prunes(tmp_path):
    benchmark = fusion.Fusion(
        num_train=4, num_val=2, num_calibration=2, camera_epochs=1, lidar_epochs=1, fusion_epochs=1,
        pruning_batches=1, image_size=(32, 96), extent=16.0, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    (tmp_path / "dense").mkdir()
    dense = benchmark.train_dense(0, tmp_path / "dense")
    views = ["", "/camera_dropped", "/lidar_dropped", "/camera_degraded", "/beams_dropped"]
    measured = {f"{metric}{view}" for metric in ("miou", "ap") for view in views}
    assert dense.keys() == measured | {f"{m}/{s}_alone" for m in ("miou", "ap") for s in ("camera", "lidar")}
    modalities = {name: list(patterns) for name, patterns in benchmark.modalities.items()}
    callback = AlterMOMACallback(modalities, 0.5, Magnitude(), OneShot(), figures=False)
    assert benchmark.prune(0, tmp_path / "dense", callback, 1).keys() == measured
    assert callback.report().sparsity == pytest.approx(0.5, abs=1e-4)


def test_the_cost_of_selection_is_measured(tmp_path, capsys):
    selection.main(["--sizes", "1000", "--repeats", "2", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["cat + kthvalue", "top_k", "top_k with floors"]
    assert rows[0]["time_ratio_range"] == [1.0, 1.0]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert "Selection at 90%" in capsys.readouterr().out
