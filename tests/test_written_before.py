"""Checkpoints, YAML and comparisons that version 0.1.0 of November 2026 wrote are read by this one.

The files in `written_before/` are of the toy models in `helpers/`, made before the package was regrouped.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from altermoma_pl import AlterEva, Magnitude, Masks, OneShot, ProsPr, Rewinding, Slimmed
from altermoma_pl.cli import main
from altermoma_pl.compare import Method, compare
from tests.helpers.conv_models import Frames, TwoTowers
from tests.helpers.lightning_models import Fusion, assert_same, loader, nonzero_pruned, pruner, short, trainer
from tests.helpers.toy import Toy, notes

FILES = Path(__file__).parent / "written_before"
ROOT = FILES.parents[1]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["altermoma"])


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights():
    """In the middle of lottery rounds, with components and a state to rewind to."""
    module = Fusion()
    torch.manual_seed(3)
    callback = pruner(schedule=Rewinding(rounds=2, epochs_per_round=2, rewind_epoch=1), name="first")
    trainer(callback, max_epochs=4).fit(
        module, loader(), loader(seed=1), ckpt_path=str(FILES / "weights.ckpt"), weights_only=True
    )
    after = torch.load(FILES / "weights_after.pt", weights_only=True)
    assert_same(dict(module.state_dict()), dict(after["state_dict"]))
    assert callback.masks == Masks.from_state_dict(after["masks"])
    assert callback.events == after["events"]


def test_a_slim_checkpoint_is_trained_on():
    module = TwoTowers(width=8)
    path = str(FILES / "slim.ckpt")
    trainer(Slimmed(path), max_epochs=3).fit(module, datamodule=Frames(), ckpt_path=path, weights_only=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert {n: t.shape for n, t in module.state_dict().items()} == {n: t.shape for n, t in saved.items()}
    assert not torch.equal(module.head.weight, saved["head.weight"])


def test_the_command_line_reads_both(capsys):
    main(["report", str(FILES / "weights.ckpt"), "--format", "csv"])
    assert "camera.0.weight,camera,24," in capsys.readouterr().out
    main(["report", str(FILES / "slim.ckpt")])
    shown = capsys.readouterr().out
    assert "Slim model: " in shown
    assert "peak memory" in shown


def test_channels_are_exported_from_an_earlier_checkpoint(tmp_path):
    arguments = [str(FILES / "channels.ckpt"), "--config", str(FILES / "channels.yaml"), "--repeats", "0"]
    main(["export", *arguments, "--output", str(tmp_path / "slim.ckpt")])
    made, before = (
        torch.load(path, weights_only=True) for path in (tmp_path / "slim.ckpt", FILES / "slim.ckpt")
    )
    assert_same(dict(made["state_dict"]), dict(before["state_dict"]))
    assert made["slim"]["widths"] == before["slim"]["widths"]
    assert made["slim"]["attributes"] == before["slim"]["attributes"]


def test_a_saved_yaml_with_every_option_is_fitted(tmp_path):
    main(["fit", "--config", str(FILES / "run.yaml")])
    again = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())
    assert again["pruning"] == yaml.safe_load((FILES / "run.yaml").read_text())["pruning"]
    (path,) = (tmp_path / "lightning_logs/version_0/checkpoints").iterdir()
    state = torch.load(path, weights_only=True)
    masks = Masks.from_state_dict(state["callbacks"]["AlterMOMACallback"]["masks"])
    module = Fusion()
    module.load_state_dict(state["state_dict"])
    assert masks.sparsity == 0.5
    assert nonzero_pruned(module, masks) == 0


def test_a_comparison_is_read_and_only_what_is_new_runs(tmp_path):
    folder = tmp_path / "comparison"
    shutil.copytree(FILES / "comparison", folder)
    methods = {
        "AlterEva": Method(short()),
        "paper": Method(AlterEva.paper(), min_density=0.0),
        "ProsPr": Method(ProsPr(num_probe_batches=2)),
        "magnitude": Method(Magnitude()),
    }
    options = {"sparsities": [0.5], "seeds": 2, "num_epochs": 1, "output_dir": str(folder)}
    options |= {"schedule": OneShot(), "min_density": 0.0}
    diary = tmp_path / "diary"
    diary.touch()
    compare(Toy(diary=str(diary)), methods, **options)
    assert notes(diary) == []
    for name in ("tables.md", "tables.tex", "results.csv"):
        assert (folder / name).read_text() == (FILES / "comparison" / name).read_text(), name
    compare(Toy(diary=str(diary)), methods | {"late": Method(Magnitude(), num_epochs=2)}, **options)
    assert len(notes(diary)) == 2
