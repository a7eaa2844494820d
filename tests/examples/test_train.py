"""The examples' entry points, run as a user runs them but on a few tiny frames."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Trainer

from altermoma_pl import AlterEva, AlterMOMACallback, Channel, Cubic, Magnitude, NofM
from altermoma_pl.cli import main
from altermoma_pl.export import check_onnx
from altermoma_pl.export.run import Run
from altermoma_pl.granularity import parse_granularity
from examples.data.datamodule import DrivingData
from examples.models.fusion import FusionModel
from examples.models.module import FusionModule
from examples.train import MODALITIES, VIEWS, Epochs, run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
SIZE = (32, 64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def tiny_data(cache):
    return DrivingData(
        num_train=8, num_val=4, num_calibration=4, batch_size=4, image_size=SIZE, cache_dir=cache
    )


def tiny_callback():
    criterion = AlterEva(num_probe_batches=1, num_reactivation_steps=1)
    return AlterMOMACallback(MODALITIES, sparsity=0.75, criterion=criterion, schedule=Cubic(end=1))


@pytest.fixture(scope="module")
def result(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run(
        tiny_data(cache),
        tiny_callback(),
        epochs=Epochs(1, 1, 1, 2),
        output_dir=str(folder),
        accelerator="cpu",
        progress_bar=False,
    )


@pytest.fixture(autouse=True)
def _quiet_jsonargparse(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def test_run_measures_every_stage(result):
    assert list(result.alone) == ["camera", "lidar"]
    assert list(result.dense) == list(result.pruned) == list(VIEWS)
    for metrics in (*result.alone.values(), *result.dense.values(), *result.pruned.values()):
        assert 0 <= metrics["miou"] <= 1
        assert 0 <= metrics["ap"] <= 1
    saved = json.loads((result.output_dir / "result.json").read_text())
    assert saved["pruned"] == result.pruned
    assert saved["kept"].keys() == {"camera", "lidar", "shared"}


def test_the_pruned_checkpoint_loads_into_the_plain_model(result):
    checkpoint = torch.load(result.output_dir / "pruned.ckpt", weights_only=True)
    state = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    model = FusionModel(num_map_classes=5, image_size=SIZE)
    model.load_state_dict(state)
    weights = [dict(model.named_parameters())[layer.name[6:]] for layer in result.report.layers]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    assert zeros >= round(0.75 * total)
    assert result.report.total.num_kept == total - round(0.75 * total)


def test_run_draws_figures(result):
    drawn = {path.name for path in (result.output_dir / "pruning").iterdir()}
    assert drawn == {"kept_per_layer.png", "sparsity_over_epochs.png", "importance_against_redundancy.png"}


def test_run_repeats_bit_for_bit_from_a_dense_checkpoint(result, cache, tmp_path):
    again = run(
        tiny_data(cache),
        tiny_callback(),
        epochs=Epochs(1, 1, 1, 2),
        dense=str(result.output_dir / "dense.ckpt"),
        output_dir=str(tmp_path),
        accelerator="cpu",
        progress_bar=False,
    )
    assert again.alone == {}
    assert again.dense == result.dense
    first, second = (
        torch.load(each.output_dir / "pruned.ckpt", weights_only=True)["state_dict"]
        for each in (result, again)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_report_reads_the_checkpoint(result, capsys):
    main(["report", str(result.output_dir / "pruned.ckpt"), "--format", "json"])
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(result.report.sparsity)


def test_export_by_the_configuration_beside_the_checkpoint(result, cache, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder, output = result.output_dir, result.output_dir / "pruned.onnx"
    config = str(folder / "model.yaml")
    arguments = ["--config", config, "--format", "onnx", "--repeats", "1"]
    main(["export", str(folder / "pruned.ckpt"), *arguments])
    assert f"Written: {output}" in capsys.readouterr().out
    model = FusionModel(num_map_classes=5, image_size=SIZE)
    saved = torch.load(folder / "pruned.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})
    data = tiny_data(cache)
    data.setup()
    batch = next(iter(data.calibration_dataloader()))
    assert check_onnx(output, model, batch) < 1e-4


def test_the_configuration_makes_the_same_data(result, cache):
    first, second = Run.load(str(result.output_dir / "model.yaml")).data, tiny_data(cache)
    names = inspect.signature(DrivingData).parameters
    assert {name: getattr(first, name) for name in names} == {name: getattr(second, name) for name in names}


@pytest.mark.filterwarnings("ignore:.* batches were asked for")
def test_quickstart(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart

    flags = {
        "--output_dir": tmp_path,
        "--accelerator": "cpu",
        "--pruning.sparsity": 0.8,
        "--epochs": '{"camera": 1, "lidar": 1, "fusion": 1, "pruning": 4}',
        "--data.image_size": list(SIZE),
        "--data.cache_dir": cache,
        "--data.num_train": 8,
        "--data.num_val": 4,
        "--data.num_calibration": 4,
    }
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *(f"{key}={value}" for key, value in flags.items())])
    quickstart.main()
    printed = capsys.readouterr().out
    assert "Pruned to 80% sparsity" in printed
    assert "LiDAR dropped" in printed
    assert str(tmp_path / "pruned.ckpt") in printed


@pytest.mark.parametrize("name", ["kitti", "synthetic"])
def test_configuration_is_accepted_by_run(name):
    parser = ArgumentParser()
    parser.add_function_arguments(run)
    config = parser.instantiate(parser.parse_path(CONFIGS / f"{name}.yaml"))
    assert config.pruning.sparsity in (0.8, 0.9)
    assert config.epochs.pruning > config.pruning.schedule.last_epoch


@pytest.mark.filterwarnings("ignore:.* batches were asked for")
def test_fit_configuration_prunes_a_dense_checkpoint(result, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["altermoma"])
    main(
        [
            "fit",
            f"--config={CONFIGS / 'fit.yaml'}",
            f"--model.weights={result.output_dir / 'dense.ckpt'}",
            f"--model.image_size={list(SIZE)}",
            f"--data.image_size={list(SIZE)}",
            f"--data.cache_dir={cache}",
            "--data.num_train=8",
            "--data.num_val=4",
            "--data.num_calibration=4",
            "--trainer.accelerator=cpu",
            "--trainer.fast_dev_run=true",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert "sparsity 0.9000" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overlay", "granularity", "sparsity"),
    [("channel_30", Channel(), 0.3), ("channel_50", Channel(), 0.5), ("two_four", NofM(2, 4), 0.5)],
)
def test_overlays_prune_what_they_say(cache, tmp_path, overlay, granularity, sparsity):
    parser = ArgumentParser()
    parser.add_function_arguments(run, as_positional=False)
    parser.add_argument("--config", action="config")
    files = [f"--config={CONFIGS / name}.yaml" for name in ("synthetic", overlay)]
    callback = parser.instantiate(parser.parse_args(files)).pruning
    assert parse_granularity(callback.granularity) == granularity
    assert (callback.sparsity, callback.criterion.num_probe_batches) == (sparsity, 8)

    data = tiny_data(cache)
    data.prepare_data()
    data.setup()
    names = list(data.map_classes)
    module = FusionModule(image_size=SIZE, num_map_classes=len(names), map_classes=names, grid=data.grid)
    trainer = Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.callbacks.append(callback)
    callback.criterion = Magnitude()
    trainer.fit(module, datamodule=data)
    event = callback.events[-1]
    assert event.get("channels", event["sparsity"]) == pytest.approx(sparsity, abs=0.02)
