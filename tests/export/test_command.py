"""`altermoma export`, and `altermoma report` of what it wrote."""

import csv
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from torch.utils.data import DataLoader

from altermoma_pl import AlterMOMACallback, Channel, Magnitude, OneShot
from altermoma_pl.callback import Slimmed
from altermoma_pl.cli import main
from altermoma_pl.export import check_onnx, export
from altermoma_pl.export.run import Run
from altermoma_pl.granularity.channels.resizing import KEY, reshape_like_
from altermoma_pl.report import figures
from tests.helpers.conv_models import Detached, Frames, TwoTowers, frames, stacked
from tests.helpers.lightning_models import trainer

MODEL = {"class_path": "tests.helpers.conv_models.TwoTowers"}
DATA = {"class_path": "tests.helpers.conv_models.Frames"}


def batch(count=2):
    return stacked(frames(count, seed=2))


def trained(path, model, **options):
    """The checkpoint of two epochs, with half pruned before the second."""
    options = {"sparsity": 0.5, "criterion": Magnitude(), "schedule": OneShot(1), "figures": False} | options
    pruning = AlterMOMACallback({"camera": ["camera"], "lidar": ["lidar"]}, **options)
    built = trainer(pruning, max_epochs=2, default_root_dir=path.parent)
    built.fit(model, datamodule=Frames())
    built.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def channels(runs):
    """A checkpoint with half of the channels pruned."""
    return trained(runs / "channels.ckpt", TwoTowers(), granularity="channel")


@pytest.fixture(scope="module")
def weights(runs):
    """A checkpoint with most of the single weights pruned, whole rows among them."""
    path = trained(runs / "weights.ckpt", TwoTowers(), sparsity=0.85, min_density=0.0, prunable=["!head"])
    weight = masked(path).camera[3].weight.flatten(1)
    assert not (weight != 0).any(1).all()
    return path


@pytest.fixture(scope="module")
def slim_file(channels, runs):
    config = written(runs, model=MODEL, data=DATA)
    return str(export(channels, config, output=str(runs / "slim.ckpt"), repeats=1).path)


def written(folder, name="config.yaml", **content):
    (folder / name).write_text(yaml.safe_dump(content))
    return str(folder / name)


@pytest.fixture
def config(tmp_path):
    return written(tmp_path, model=MODEL, data=DATA)


def masked(checkpoint):
    model = TwoTowers().eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return model


def edited(checkpoint, folder, change):
    saved = torch.load(checkpoint, weights_only=True)
    change(saved)
    torch.save(saved, folder / "edited.ckpt")
    return str(folder / "edited.ckpt")


def failure(capsys, *arguments, code=1):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == code
    return " ".join(capsys.readouterr().err.split())


# What is written.


def test_a_slim_checkpoint_gives_what_the_masked_one_gives(channels, slim_file):
    saved = torch.load(slim_file, weights_only=True)
    model = TwoTowers()
    reshape_like_(model, saved["state_dict"], saved[KEY])
    model.load_state_dict(saved["state_dict"])
    assert_close(model.eval()(batch()), masked(channels)(batch()))
    sizes = {name: tuple(t.shape[:2]) for name, t in model.named_parameters() if t.ndim == 4}
    widths = {name: kept for name, (kept, _) in saved[KEY]["widths"].items()}
    assert sum(widths.values()) == 24
    assert sizes["camera.3.weight"] == (widths["camera.0"], widths["camera.3"])  # transposed
    assert sizes["head.weight"] == (1, widths["camera.3"] + widths["lidar.0"])
    assert saved[KEY]["modalities"] == {"camera.0": "camera", "camera.3": "camera", "lidar.0": "lidar"}
    assert "AlterMOMACallback" not in saved["callbacks"]


def test_states_of_optimizers_are_sliced_and_training_goes_on(slim_file, channels, tmp_path):
    saved = torch.load(slim_file, weights_only=True)
    names = [name for name, _ in TwoTowers().named_parameters()]
    (optimizer,) = saved["optimizer_states"]
    assert len(optimizer["state"]) == len(names)
    for number, state in optimizer["state"].items():
        assert state["exp_avg"].shape == saved["state_dict"][names[number]].shape
    built = trainer(Slimmed(slim_file), num_sanity_val_steps=2, default_root_dir=tmp_path)
    built.fit(TwoTowers(), datamodule=Frames(), ckpt_path=slim_file)
    assert built.current_epoch == 3


def test_a_state_that_cannot_be_sliced_is_left_out_with_a_note(channels, config, tmp_path):
    def foreign(saved):
        saved["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(5, 5)

    path = edited(channels, tmp_path, foreign)
    exported = export(path, config, repeats=0)
    assert torch.load(exported.path, weights_only=True)["optimizer_states"] == []
    (note,) = exported.notes
    assert note.startswith("The optimizers' state was left out: the state 'exp_avg' of 'camera.0.weight'")
    assert note.endswith("Start a new fit from the weights.")


def test_declared_groups_of_a_checkpoint_are_removed(tmp_path):
    declared = {"stem": {"camera.0": "out", "camera.1": "out", "camera.3": "in"}}
    path = trained(tmp_path / "detached.ckpt", Detached(), granularity=Channel(declared=declared))
    config = written(tmp_path, model={"class_path": "tests.helpers.conv_models.Detached"}, data=DATA)
    exported = export(path, config, repeats=0)
    saved = torch.load(exported.path, weights_only=True)
    kept, total = saved[KEY]["widths"]["stem"]
    assert (kept, total) == (8, 16)
    assert saved["state_dict"]["camera.0.weight"].shape[0] == kept
    assert exported.notes == ()


def test_onnx_of_channels(channels, config, tmp_path, capsys):
    main(["export", channels, "--config", config, "--format", "onnx", "--repeats", "2",
          "--output", str(tmp_path / "new" / "model.onnx")])  # fmt: skip
    out = capsys.readouterr().out
    assert "onnxruntime differs from torch by" in out
    assert out.endswith(f"Written: {tmp_path / 'new' / 'model.onnx'}\n")
    assert re.search(r"dense +\S* *masked +\S* */ dense \S* *slim", out)
    assert check_onnx(tmp_path / "new" / "model.onnx", masked(channels), batch(3)) < 1e-5


def test_torch_export_of_channels(channels, config, tmp_path):
    before = Path(channels).read_bytes()
    copied = edited(channels, tmp_path, lambda saved: None)
    exported = export(copied, config, "torch-export", repeats=0)
    assert exported.path == tmp_path / "edited.pt2"
    assert exported.costs is None
    found = torch.export.load(exported.path).module()(image=batch(3).image, sweep=batch(3).sweep)
    assert_close(found["output"], masked(channels)(batch(3)))
    assert Path(channels).read_bytes() == before


@pytest.mark.parametrize(("format", "name"), [("checkpoint", "a.b.slim.ckpt"), ("onnx", "a.b.onnx")])
def test_the_file_is_called_as_the_checkpoint(channels, config, tmp_path, format, name):
    path = tmp_path / "a.b.ckpt"
    path.write_bytes(Path(channels).read_bytes())
    before = path.read_bytes()
    assert export(str(path), config, format, repeats=0).path == tmp_path / name
    assert path.read_bytes() == before


def test_single_weights_as_onnx_have_a_note(weights, config, tmp_path):
    exported = export(weights, config, "onnx", output=str(tmp_path / "model.onnx"), repeats=1)
    assert exported.notes[0].startswith("Single weights are pruned: zeros in dense tensors take as much time")
    assert list(exported.costs.costs) == ["dense", "masked"]
    assert check_onnx(exported.path, masked(weights), batch()) < 1e-5


def test_single_weights_as_checkpoint_are_an_error(weights, config, tmp_path, capsys):
    error = failure(capsys, "export", weights, "--config", config, "--output", str(tmp_path / "x"))
    assert "has single weights pruned: there are no channels to remove" in error
    assert "prune with granularity='channel', or give --format torch-export or onnx" in error
    assert not (tmp_path / "x").exists()


def test_a_slim_checkpoint_as_onnx(slim_file, channels, config, tmp_path):
    exported = export(slim_file, config, "onnx", output=str(tmp_path / "model.onnx"), repeats=1)
    assert list(exported.costs.costs) == ["dense", "slim"]
    dense, smaller = exported.costs.costs.values()
    assert smaller.num_parameters < dense.num_parameters
    assert check_onnx(exported.path, masked(channels), batch()) < 1e-5
    with pytest.raises(ValueError, match="is of a slim model already: give --format torch-export or onnx"):
        export(slim_file, config, output=str(tmp_path / "again.ckpt"))


# What is measured.


def test_recalibrated_models_have_a_column_and_are_written(channels, slim_file, config, tmp_path):
    exported = export(
        channels, config, output=str(tmp_path / "a.ckpt"), recalibrate=2, validate=True, repeats=1
    )
    costs = exported.costs.costs
    assert list(costs) == ["dense", "masked", "slim", "slim, recalibrated"]
    assert costs["dense"].metrics == {}
    assert costs["masked"].metrics.keys() == {"val_loss"}  # and not the thirty others
    assert costs["slim"].metrics["val_loss"] == pytest.approx(costs["masked"].metrics["val_loss"])
    assert costs["slim, recalibrated"].metrics["val_loss"] != costs["slim"].metrics["val_loss"]
    before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (slim_file, exported.path))
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        f"{norm}.{name}"
        for norm in ("camera.1", "camera.4", "lidar.1")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_recalibrated_masked_models(weights, config, tmp_path):
    path = str(tmp_path / "m.onnx")
    exported = export(weights, config, "onnx", path, recalibrate=1, repeats=1)
    assert list(exported.costs.costs) == ["dense", "masked", "masked, recalibrated"]
    with pytest.raises(ValueError, match="differs by"):
        check_onnx(path, masked(weights), batch())


def test_without_a_favourite_the_first_metrics_are_shown(channels, tmp_path):
    config = written(tmp_path, model={"class_path": "tests.helpers.conv_models.Quiet"}, data=DATA)
    exported = export(channels, config, output=str(tmp_path / "a.ckpt"), validate=True, repeats=1)
    assert list(exported.costs.costs["slim"].metrics) == [f"val_{number}" for number in range(8)]
    assert exported.costs.batch == 1


def test_recalibration_of_a_model_that_takes_no_batch(channels, tmp_path):
    config = written(tmp_path, model={"class_path": "tests.helpers.conv_models.Quiet"}, data=DATA)
    with pytest.raises(ValueError, match=r"Quiet does not accept a training batch: .* `predict_step"):
        export(channels, config, output=str(tmp_path / "a.ckpt"), recalibrate=1, repeats=0)


def test_without_data_the_example_of_the_module_is_taken(channels, tmp_path):
    config = written(tmp_path, model=MODEL | {"init_args": {"example": True}})
    exported = export(channels, config, "onnx", output=str(tmp_path / "a.onnx"), repeats=1)
    assert measured_batches(exported) == [1, 8]


def measured_batches(exported):
    (batches,) = {tuple(own.batch for own in costs.latency) for costs in exported.costs.costs.values()}
    return [*batches]


def test_latencies_are_of_batches_of_1_and_8(channels, config, tmp_path):
    exported = export(channels, config, "onnx", output=str(tmp_path / "a.onnx"), repeats=1)
    assert measured_batches(exported) == [1, 8]
    timed = [note for note in exported.notes if re.match(r"onnxruntime, batch \d+, \d+ threads?: ", note)]
    assert [note.split(",")[1] for note in timed] == [" batch 1", " batch 8"]
    assert all(re.search(r": [\d.]+ ms \[.*\], dense [\d.]+ ms: [\d.]+ times as fast\.$", n) for n in timed)


def test_other_batches_than_those_have_a_note(channels, tmp_path):
    data = {"class_path": "tests.helpers.conv_models.Frames", "init_args": {"num_val": 5}}
    config = written(tmp_path, model=MODEL, data=data)
    exported = export(channels, config, output=str(tmp_path / "a.ckpt"), repeats=1)
    assert measured_batches(exported) == [1, 5]
    (note,) = exported.notes
    assert note == "Measured with batches of 1 and 5, not of 1 and 8: the data does not give those."


def test_a_checkpoint_is_there_whole_or_not_at_all(channels, config, tmp_path, monkeypatch):
    path = export(channels, config, output=str(tmp_path / "a.ckpt"), repeats=0).path
    before = path.read_bytes()

    def half(content, destination):
        Path(destination).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        export(channels, config, output=str(path), repeats=0)
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"a.ckpt", "config.yaml"}


def test_a_named_tuple_as_example_is_the_only_argument():
    module = TwoTowers()
    module.example_input_array = batch(2)
    assert Run(module, None).example_inputs() == (module.example_input_array,)
    module.example_input_array = [batch(2)]
    assert len(Run(module, None).example_inputs()) == 1


def test_nothing_is_timed_without_repeats(channels, config, tmp_path):
    exported = export(channels, config, "onnx", output=str(tmp_path / "a.onnx"), repeats=0)
    assert exported.costs is None
    assert not any("times as fast" in note for note in exported.notes)


def test_batches_of_the_data_are_made_anew():
    inputs = Run(TwoTowers(), Frames()).inputs_of((1, 3, 20))
    assert [(size, len(frame.image)) for size, (frame,) in inputs.items()] == [(1, 1), (3, 3), (8, 8)]
    assert torch.equal(inputs[3][0].image, stacked(frames(8, seed=1)[:3]).image)


def test_batches_of_an_example_repeat_its_items():
    module = TwoTowers(example=True)
    (own,) = module.example_input_array
    inputs = Run(module, Frames()).inputs_of((2, 4))
    assert torch.equal(inputs[2][0].image, own.image[:2])
    assert torch.equal(inputs[4][0].sweep, own.sweep[[0, 1, 2, 0]])


def test_batches_that_cannot_be_made_anew_are_taken_as_they_are():
    class Batched(Frames):
        def val_dataloader(self):  # the dataset is of batches
            return DataLoader([stacked(frames(5))], batch_size=None)

    assert [*Run(TwoTowers(), Batched()).inputs_of((1, 8))] == [5]
    module = TwoTowers()
    module.example_input_array = (batch(2), torch.zeros(7))  # whose first dimension is no batch's, perhaps
    assert [*Run(module, Frames()).inputs_of((1, 8))] == [2]


# Mistakes.


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({}, [], "names no model: it needs `model:` with class_path and init_args"),
        ({"model": None}, [], "names no model"),
        ({"model": MODEL}, [], "example inputs are missing: give `data:` in the configuration, or TwoTowers"),
        ({"model": MODEL | {"init_args": {"widht": 4}}}, [], "widht"),
        ({"model": {"class_path": "tests.helpers.conv_models.Missing"}}, [], "Missing"),
        ({"model": {"class_path": "torch.nn.Linear"}}, [], "LightningModule"),
        (
            {"model": MODEL | {"init_args": {"width": 8}}, "data": DATA},
            [],
            "do not fit TwoTowers as it is configured",
        ),
        ({"model": MODEL}, ["--validate"], "--validate needs `data:` in the configuration"),
        ({"model": MODEL}, ["--recalibrate", "2"], "--recalibrate needs `data:` in the configuration"),
        ({"model": MODEL}, ["--recalibrate", "-2"], "--recalibrate must be 0 or more, got -2"),
        ({"model": MODEL}, ["--repeats", "-1"], "--repeats must be 0 or more, got -1"),
        ({"model": MODEL}, ["--validate", "--repeats", "0"], "give --repeats 1 or more"),
        ({"model": MODEL}, ["--opset", "18"], "--opset is of ONNX, the format is 'checkpoint'"),
        (
            {"model": MODEL, "data": DATA},
            ["--format", "onnx", "--opset", "6", "--repeats", "0"],
            "opset 6 cannot be had for TwoTowers",
        ),
    ],
)
def test_mistakes_in_options(channels, tmp_path, capsys, content, arguments, message):
    config = written(tmp_path, **content)
    output = tmp_path / "out"
    error = failure(capsys, "export", channels, "--config", config, "--output", str(output), *arguments)
    assert message in error
    assert error.startswith("altermoma export: error: ")
    assert not output.exists()


def test_a_configuration_that_is_no_yaml(channels, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"bad[.]yaml is no YAML"):
        export(channels, str(tmp_path / "bad.yaml"))
    with pytest.raises(FileNotFoundError):
        export(channels, str(tmp_path / "none.yaml"))


def test_the_checkpoint_is_not_overwritten(channels, config, tmp_path):
    with pytest.raises(ValueError, match="is the checkpoint itself: give another file"):
        export(channels, config, output=os.path.relpath(channels))


def test_a_format_that_is_not_known(channels, config, capsys):
    assert "['checkpoint', 'torch-export', 'onnx']. Got value: tflite" in failure(
        capsys, "export", channels, "--config", config, "--format", "tflite", code=2
    )


def _unpruned(saved):
    del saved["callbacks"]["AlterMOMACallback"]


def _nonzero(saved):
    saved["state_dict"]["head.weight"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unpruned, "has no state of AlterMOMACallback: give a checkpoint that a Trainer with this callback"),
        (_nonzero, "is not zero where its mask prunes it"),
    ],
)
def test_damaged_checkpoints(channels, config, tmp_path, capsys, change, message):
    path = edited(channels, tmp_path, change)
    assert message in failure(capsys, "export", path, "--config", config)


def test_half_a_checkpoint(channels, config, tmp_path, capsys):
    content = Path(channels).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    error = failure(capsys, "export", str(tmp_path / "half.ckpt"), "--config", config)
    assert "half.ckpt is no checkpoint, or only a part of one" in error
    assert "none.ckpt" in failure(capsys, "export", str(tmp_path / "none.ckpt"), "--config", config)


def test_a_checkpoint_before_any_event(config, tmp_path):
    path = trained(tmp_path / "early.ckpt", TwoTowers(), sparsity=0.0)
    with pytest.raises(ValueError, match=r"its masks keep everything; give a checkpoint after an event"):
        export(path, config)


def test_without_torch_pruning_the_extra_is_named(channels, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    error = failure(capsys, "export", channels, "--config", config, "--output", str(tmp_path / "x"))
    assert "altermoma-pl[structured]" in error


def test_without_onnx_the_extra_is_named(channels, config, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    output = str(tmp_path / "x")
    error = failure(
        capsys,
        "export",
        channels,
        "--config",
        config,
        "--format",
        "onnx",
        "--output",
        output,
        "--repeats",
        "0",
    )
    assert "altermoma-pl[export]" in error


# Report.


def report(capsys, *arguments):
    main(["report", *arguments])
    return capsys.readouterr().out


def test_report_of_a_slim_checkpoint(slim_file, capsys):
    lines = report(capsys, slim_file).splitlines()
    assert lines[0].strip() == "Slim model: 24 of 48 channels kept"
    rows = [line.split("│")[1:4] for line in lines if "│" in line]
    shown = [[cell.strip() for cell in row] for row in rows]
    assert ["camera", "camera.0", "16"] in shown
    assert ["lidar", "lidar.0", "16"] in shown
    assert any(line.strip() == "Costs when it was written" for line in lines)


def test_report_of_a_slim_checkpoint_as_json_and_csv(slim_file, capsys):
    found = json.loads(report(capsys, slim_file, "--format", "json"))
    kept = {width["name"]: width["num_kept"] for width in found["widths"]}
    assert sum(kept.values()) == 24
    assert list(found["costs"]["costs"]) == ["dense", "masked", "slim"]
    rows = list(csv.DictReader(io.StringIO(report(capsys, slim_file, "--format", "csv"))))
    assert {row["name"]: int(row["num_kept"]) for row in rows} == kept
    assert {row["modality"] for row in rows} == {"camera", "lidar"}


def test_report_without_costs(channels, config, tmp_path, capsys):
    path = str(export(channels, config, output=str(tmp_path / "a.ckpt"), repeats=0).path)
    assert "Costs" not in report(capsys, path)
    assert json.loads(report(capsys, path, "--format", "json"))["costs"] is None


def test_figures_of_a_slim_checkpoint(slim_file, tmp_path, capsys, monkeypatch):
    report(capsys, slim_file, "--figures", str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["widths.png"]
    monkeypatch.setattr(figures, "available", lambda: False)
    assert "needs matplotlib" in failure(capsys, "report", slim_file, "--figures", str(tmp_path), code=2)


@pytest.mark.parametrize("key", ["widths", "modalities", "costs"])
def test_report_of_a_damaged_slim_checkpoint(slim_file, tmp_path, capsys, key):
    path = edited(slim_file, tmp_path, lambda saved: saved[KEY].update({key: 3}))
    error = failure(capsys, "report", path, code=2)
    assert "what the checkpoint says of its slim model is damaged" in error
