"""The command line: `altermoma fit | validate | test | report`, and the callback in a stock LightningCLI."""

import csv
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import altermoma_pl
from altermoma_pl.cli import main
from altermoma_pl.report import figures
from tests.helpers.lightning_models import NUM_WEIGHTS, Fusion, num_zeros, pruning_state_of

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")  # by Lightning, on resume

CONFIG = """
seed_everything: false
model: {class_path: tests.helpers.lightning_models.Fusion}
data: {class_path: tests.helpers.lightning_models.Data}
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  log_every_n_steps: 1
"""
PRUNING = """
pruning:
  modalities: {camera: [camera], lidar: lidar}
  sparsity: 0.5
  criterion: {class_path: AlterEva, init_args: {num_probe_batches: 2, num_reactivation_steps: 2}}
  schedule: {class_path: OneShot, init_args: {epoch: 1}}
  store_components: true
  figures: false
"""
MINE = """
from dataclasses import dataclass

from altermoma_pl import Criterion, Schedule


@dataclass(frozen=True)
class Smallest(Criterion):
    \"\"\"Keeps the smallest weights.

    Args:
        sign: Minus one, to keep the smallest.
    \"\"\"

    sign: float = 1.0

    def score(self, calibration):
        return {name: self.sign * w.detach().abs() for name, w in calibration.weights.items()}


@dataclass(frozen=True)
class AtEpoch(Schedule):
    \"\"\"One event.

    Args:
        when: The epoch.
    \"\"\"

    when: int = 0

    @property
    def last_epoch(self):
        return self.when

    def is_due(self, epoch):
        return epoch == self.when

    def sparsity_at(self, epoch, target):
        return target if epoch >= self.when else 0.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a configuration and a module of the user's own."""
    (tmp_path / "config.yaml").write_text(CONFIG + PRUNING)
    (tmp_path / "altermoma_test_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["altermoma"])
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a run by the command line, 60 of 120 weights pruned at epoch 1."""
    path = tmp_path_factory.mktemp("run")
    (path / "config.yaml").write_text(CONFIG + PRUNING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "argv", ["altermoma"])
        main(["fit", "--config", "config.yaml"])
    return saved(path)


def saved(folder: Path, version: int = 0) -> str:
    (path,) = (folder / "lightning_logs" / f"version_{version}" / "checkpoints").iterdir()
    return str(path)


def fit(*arguments: str) -> Any:
    """Fit in the current folder; the pruning state that it saves."""
    main(["fit", "--config", "config.yaml", *arguments])
    return pruning_state_of(saved(Path.cwd()))


def failure(capsys: Any, *arguments: str) -> str:
    """What the command prints when it fails."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def printed(capsys: Any, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


# Fit.


def test_fit_from_a_file(checkpoint):
    state = pruning_state_of(checkpoint)
    assert [(event["epoch"], event["sparsity"]) for event in state.events] == [(1, 0.5)]
    assert state.masks.num_weights == NUM_WEIGHTS
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain = Fusion()
    plain.load_state_dict(weights, strict=True)
    assert num_zeros(plain) == 60


@pytest.mark.parametrize(
    ("arguments", "zeros", "epochs"),
    [
        (["--pruning.sparsity", "0.8"], 96, [1]),
        (["--pruning.schedule.epoch", "2"], 60, [2]),
        (["--pruning.schedule", "Cubic", "--pruning.schedule.end", "1"], 60, [0, 1]),
        (["--pruning.criterion", "Magnitude"], 60, [1]),
        (["--pruning.schedule=Rewinding", "--pruning.schedule.epochs_per_round=1"], 60, [0, 1, 2]),
        (["--pruning.criterion.beta=0.0"], 60, [1]),
        (["--pruning.criterion", "Random", "--pruning.seed", "3", "--pruning.scope", "layer"], 60, [1]),
        (
            [
                "--pruning.scope=modality",
                "--pruning.sparsity",
                "{camera: 0.75, lidar: 0.25, shared: 0.0}",
            ],
            42 + 14,
            [1],
        ),
        (["--pruning.prunable", "['!head']", "--pruning.loader", "training"], 56, [1]),
    ],
)
def test_flags(folder, arguments, zeros, epochs):
    state = fit(*arguments)
    assert state.masks.num_weights - state.masks.num_kept == zeros
    assert [event["epoch"] for event in state.events] == epochs


def test_overlays_merge_key_by_key(folder):
    (folder / "more.yaml").write_text("pruning: {sparsity: 0.8}")
    (folder / "late.yaml").write_text("pruning: {schedule: {init_args: {epoch: 2}}}")
    state = fit("--config", "more.yaml", "--config", "late.yaml")
    assert [(event["epoch"], round(120 * event["sparsity"])) for event in state.events] == [(2, 96)]


@pytest.mark.parametrize(
    "name", ["Magnitude", "altermoma_pl.Magnitude", "altermoma_pl.score.simple.Magnitude"]
)
def test_names_of_criteria(folder, name):
    (folder / "more.yaml").write_text(f"pruning: {{criterion: {name}}}")
    state = fit("--config", "more.yaml", "--pruning.schedule=Cubic", "--pruning.schedule.end=2")
    assert state.components is None
    assert [event["epoch"] for event in state.events] == [0, 1, 2]


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("0.5", 0.5), ("2", 2.0)])
def test_beta_from_a_file_and_back(folder, capsys, value, expected):
    (folder / "more.yaml").write_text(f"pruning: {{criterion: {{init_args: {{beta: {value}}}}}}}")
    text = printed(capsys, "fit", "--config", "config.yaml", "--config", "more.yaml")
    assert yaml.safe_load(text)["pruning"]["criterion"]["init_args"]["beta"] == expected


def test_beta_auto_by_flag(folder):
    (event,) = fit("--pruning.criterion.beta=auto").events
    assert event["beta_losses"][f"{event['beta']:g}"] == min(event["beta_losses"].values())


def test_iterative_magnitude_pruning_from_a_file(folder):
    (folder / "more.yaml").write_text(
        "pruning:\n"
        "  sparsity: 0.8\n"
        "  criterion: Magnitude\n"
        "  schedule:\n"
        "    class_path: altermoma_pl.Rewinding\n"
        "    init_args: {rounds: 2, epochs_per_round: 1, rewind_epoch: 1}\n"
    )
    state = fit("--config", "more.yaml")
    assert [(event["epoch"], round(120 * event["sparsity"])) for event in state.events] == [(1, 66), (2, 96)]


@pytest.mark.filterwarnings("ignore:.* batches were asked for, the loader has")
@pytest.mark.parametrize(
    "criterion",
    [
        "{class_path: SNIP, init_args: {num_probe_batches: 2}}",
        "{class_path: altermoma_pl.Taylor}",
        "{class_path: GraSP, init_args: {hessian: finite_difference}}",
        "{class_path: altermoma_pl.SynFlow, init_args: {num_iterations: 2, density: 0.1}}",
        "{class_path: ProsPr, init_args: {order: full, momentum: 0.9, num_steps: 2}}",
        "Wanda",
    ],
)
def test_baselines_by_name(folder, criterion):
    (folder / "more.yaml").write_text(f"pruning: {{criterion: {criterion}, scope: row, sparsity: 0.25}}")
    state = fit("--config", "more.yaml", "--pruning.min_density=0")
    for mask in state.masks.values():
        rows, columns = mask.shape
        assert mask.sum(1).tolist() == [columns - round(0.25 * columns)] * rows


@pytest.mark.filterwarnings("ignore:100 training batches were asked for, the loader has 4")
@pytest.mark.parametrize("name", ["altermoma_pl.AlterEva.paper", "{class_path: altermoma_pl.AlterEva.paper}"])
def test_the_published_algorithm_by_name(folder, name):
    (folder / "more.yaml").write_text(f"pruning: {{criterion: {name}}}")
    state = fit("--config", "more.yaml")
    assert state.masks.num_kept == 60
    assert state.components is not None


def test_criterion_and_schedule_of_the_users_own(folder):
    (folder / "more.yaml").write_text(
        "pruning:\n"
        "  criterion: {class_path: altermoma_test_mine.Smallest, init_args: {sign: -1.0}}\n"
        "  schedule: {class_path: altermoma_test_mine.AtEpoch, init_args: {when: 0}}\n"
        "  min_density: 0.0\n"
    )
    state = fit("--config", "more.yaml", "--trainer.max_epochs", "1")
    assert [event["epoch"] for event in state.events] == [0]
    start = {name: p.detach().abs() for name, p in Fusion().named_parameters()}
    kept = torch.cat([start[name][mask] for name, mask in state.masks.items()])
    pruned = torch.cat([start[name][~mask] for name, mask in state.masks.items()])
    assert len(kept) == 60
    assert kept.max() <= pruned.min()


def test_modules_in_the_current_folder_can_be_named(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
    sys.modules.pop("altermoma_test_mine", None)
    state = fit("--pruning.criterion", "altermoma_test_mine.Smallest")
    assert state.masks.num_kept == 60


def test_print_config_goes_round(folder, capsys):
    first = printed(capsys, "fit", "--config", "config.yaml")
    (folder / "printed.yaml").write_text(first)
    assert printed(capsys, "fit", "--config", "printed.yaml") == first
    assert "class_path: altermoma_pl.OneShot" in first
    assert "num_probe_batches: 2" in first
    assert "lidar: lidar" in first


def test_print_config_of_the_defaults_names_every_option(folder, capsys):
    (folder / "least.yaml").write_text(CONFIG + "pruning: {modalities: {camera: camera, lidar: lidar}}")
    first = printed(capsys, "fit", "--config", "least.yaml")
    (folder / "printed.yaml").write_text(first)
    assert printed(capsys, "fit", "--config", "printed.yaml") == first
    assert "class_path: altermoma_pl.AlterEva" in first
    assert "estimator: reactivated" in first
    assert "class_path: altermoma_pl.Cubic" in first
    assert "sparsity: 0.9" in first


def test_the_saved_config_repeats_the_run(folder):
    first = fit()
    main(["fit", "--config", "lightning_logs/version_0/config.yaml"])
    second = pruning_state_of(saved(folder, version=1))
    assert second.masks == first.masks
    assert second.events == first.events


def test_resume_by_ckpt_path(folder):
    first = fit("--trainer.max_epochs", "2")
    path = saved(folder)
    main(["fit", "--config", "config.yaml", "--ckpt_path", path])
    second = pruning_state_of(saved(folder, version=1))
    assert second.masks == first.masks
    assert second.events == first.events


@pytest.mark.parametrize("command", ["validate", "test"])
def test_other_commands_on_a_pruned_checkpoint(folder, checkpoint, command, capsys):
    main([command, "--config", "config.yaml", "--ckpt_path", checkpoint])
    assert "val_loss" in capsys.readouterr().out


def stopped(capsys: Any, *arguments: str) -> str:
    """What a command prints that ends well."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_lists_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["altermoma"])
    text = stopped(capsys, "--help")
    listed = text[text.index("Available subcommands") :].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("    ") and line[4] != " "]
    assert names == ["fit", "validate", "test", "report", "export", "compare"]
    text = " ".join(text.split())
    assert "report Show what a checkpoint keeps, per layer and per modality." in text
    assert "predict" not in text


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["altermoma"])
    assert stopped(capsys, "--version") == f"altermoma {altermoma_pl.__version__}\n"
    assert altermoma_pl.__version__ == importlib.metadata.version("altermoma-pl")


def test_version_of_a_folder_that_is_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        assert importlib.reload(altermoma_pl).__version__ == "0+unknown"
    importlib.reload(altermoma_pl)


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("report", ["--figures FIGURES", "--trust", "A folder; figures are also written there"]),
        (
            "export",
            ["--config CONFIG", "--validate", "--opset OPSET", "Of each latency; 0 to measure no costs."],
        ),
    ],
)
def test_help_of_a_command_is_that_of_its_docstring(capsys, command, parts):
    text = " ".join(stopped(capsys, command, "--help").split())
    assert text.startswith(f"usage: altermoma {command} ")
    assert "checkpoint Saved by a Trainer with" in text
    assert "Raises" not in text
    assert all(part in text for part in parts)


def test_a_command_behind_an_option_is_refused(folder, capsys):
    (folder / "empty.yaml").write_text("{}")
    error = failure(capsys, "--config", "empty.yaml", "report")
    assert "give report as the first argument, and its options after it" in error


WITHOUT_JSONARGPARSE = """
import importlib.metadata
import sys

version = importlib.metadata.version

def absent(name):
    if name == "jsonargparse":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.modules["jsonargparse"] = None
importlib.metadata.version = absent
from altermoma_pl.cli import main
main(["report", "a.ckpt"])
"""


@pytest.mark.slow
def test_without_jsonargparse_the_extra_is_named():
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_JSONARGPARSE],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    expected = "altermoma needs jsonargparse[signatures]: pip install 'altermoma-pl[cli]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", expected)


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--pruning.sparsty", "0.8"], ["sparsty"]),
        (["--pruning.scope", "channel"], ["scope", "channel", "global"]),
        (["--pruning.loader", "test"], ["loader", "test", "calibration"]),
        (["--pruning.criterion", "Magnitud"], ["criterion", "Magnitud"]),
        (["--pruning.schedule", "Cubik"], ["schedule", "Cubik"]),
        (["--pruning.criterion.num_probes", "3"], ["num_probes"]),
        (["--pruning.criterion.estimator", "differenze"], ["estimator", "differenze"]),
        (["--pruning.sparsity", "much"], ["sparsity", "much"]),
        (["--pruning.criterion.beta", "best"], ["beta", "best", "auto"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_typo_is_named(folder, capsys, arguments, parts):
    error = failure(capsys, "fit", "--config", "config.yaml", *arguments)
    assert all(part in error for part in parts)
    assert not (folder / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("yaml", "part"),
    [
        ("pruning: {sparsty: 0.8}", "sparsty"),
        ("pruning: {schedule: {class_path: Cubic, init_args: {ende: 3}}}", "ende"),
        ("pruning: {modalities: [camera, lidar]}", "modalities"),
    ],
)
def test_a_typo_in_a_file_is_named(folder, capsys, yaml, part):
    (folder / "more.yaml").write_text(yaml)
    assert part in failure(capsys, "fit", "--config", "config.yaml", "--config", "more.yaml")


def test_the_error_of_a_typo_in_a_key_is_short(folder, capsys):
    error = failure(capsys, "fit", "--config", "config.yaml", "--pruning.sparsty", "0.8")
    last = error.strip().splitlines()[-1]
    assert "sparsty" in last
    assert len(last) < 200


def test_modalities_are_required(folder, capsys):
    (folder / "none.yaml").write_text(CONFIG)
    assert "modalities" in failure(capsys, "fit", "--config", "none.yaml")


def test_a_value_out_of_range(folder, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        main(["fit", "--config", "config.yaml", "--pruning.sparsity", "90"])
    assert "[0, 1), got 90" in f"{stopped.value} {capsys.readouterr().err}"


# Report.


def report(capsys: Any, *arguments: str) -> str:
    capsys.readouterr()
    main(["report", *arguments])
    return capsys.readouterr().out


def test_report_as_table(checkpoint, capsys):
    out = report(capsys, checkpoint)
    assert out.startswith("Kept weights: sparsity 0.5000")
    assert "camera.0.weight" in out
    assert "loss: all" in out
    assert out.endswith("\n")
    assert not out.endswith("\n\n")


def test_report_as_json(checkpoint, capsys):
    found = json.loads(report(capsys, checkpoint, "--format", "json"))
    state = pruning_state_of(checkpoint)
    assert found["sparsity"] == 0.5
    assert [layer["num_kept"] for layer in found["layers"]] == [int(m.sum()) for m in state.masks.values()]
    assert set(found["groups"]) == {"camera", "lidar", "shared"}
    assert found["losses"] == state.events[-1]["losses"]


def test_report_as_csv(checkpoint, capsys):
    rows = list(csv.DictReader(io.StringIO(report(capsys, checkpoint, "--format", "csv"))))
    assert [row["name"] for row in rows] == list(pruning_state_of(checkpoint).masks)
    assert sum(int(row["num_kept"]) for row in rows) == 60


def test_report_draws_figures(checkpoint, tmp_path, capsys):
    report(capsys, checkpoint, "--figures", str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == [
        "importance_against_redundancy.png",
        "kept_per_layer.png",
        "sparsity_over_epochs.png",
    ]


def test_report_without_matplotlib_says_what_to_install(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    error = failure(capsys, "report", checkpoint, "--figures", str(tmp_path))
    assert "--figures needs matplotlib: pip install 'altermoma-pl[plot]'" in error


def damaged(checkpoint: str, tmp_path: Path, change: Any) -> str:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "damaged.ckpt")
    return str(tmp_path / "damaged.ckpt")


def _no_state(content: dict[str, Any]) -> None:
    content["callbacks"] = {"ModelCheckpoint": {}}


def _no_callbacks(content: dict[str, Any]) -> None:
    del content["callbacks"]


def _no_masks(content: dict[str, Any]) -> None:
    content["callbacks"]["AlterMOMACallback"]["masks"] = None


def _no_key(content: dict[str, Any]) -> None:
    del content["callbacks"]["AlterMOMACallback"]["masks"]


def _nonzero(content: dict[str, Any]) -> None:
    content["state_dict"]["lidar.0.weight"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _no_state,
            "has no state of AlterMOMACallback: give a checkpoint that a Trainer with this callback saved",
        ),
        (_no_callbacks, "has no state of AlterMOMACallback"),
        (_no_masks, "masks and groups differ"),
        (_no_key, "the pruning state in the checkpoint is damaged"),
        (_nonzero, "'lidar.0.weight' is not zero where its mask prunes it"),
    ],
)
def test_report_of_a_damaged_checkpoint(checkpoint, tmp_path, capsys, change, message):
    error = " ".join(failure(capsys, "report", damaged(checkpoint, tmp_path, change)).split())
    assert message in error


def test_report_of_no_file(capsys, tmp_path):
    assert "none.ckpt" in failure(capsys, "report", str(tmp_path / "none.ckpt"))


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint at all", b"\x80\x02."], ids=["empty", "text", "empty pickle"]
)
def test_report_of_another_file(capsys, tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    assert "other.ckpt is no checkpoint" in failure(capsys, "report", str(path))


def test_report_of_half_a_checkpoint(checkpoint, capsys, tmp_path):
    content = Path(checkpoint).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    assert "half.ckpt is no checkpoint, or only a part of one" in failure(
        capsys, "report", str(tmp_path / "half.ckpt")
    )


def test_report_of_a_tensor(capsys, tmp_path):
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert "has no state of AlterMOMACallback" in failure(capsys, "report", str(tmp_path / "tensor.pt"))


def test_report_trusts_other_objects_only_on_request(checkpoint, tmp_path, capsys):
    path = damaged(checkpoint, tmp_path, lambda content: content.update(hyper_parameters={"path": Path("x")}))
    error = " ".join(failure(capsys, "report", path).split())
    assert "is no checkpoint of tensors and builtins only; if you trust its origin, use --trust" in error
    assert "sparsity 0.5000" in report(capsys, path, "--trust")


def test_report_with_an_unknown_format(checkpoint, capsys):
    error = failure(capsys, "report", checkpoint, "--format", "xml")
    assert "Expected a typing.Literal['table', 'json', 'csv']. Got value: xml" in error


# A script of the user's own with the stock LightningCLI.


@pytest.mark.slow
def test_stock_lightning_cli(folder):
    (folder / "train.py").write_text(
        'from lightning.pytorch.cli import LightningCLI\n\nif __name__ == "__main__":\n    LightningCLI()\n'
    )
    (folder / "stock.yaml").write_text(
        CONFIG
        + "  callbacks:\n"
        + "    - class_path: altermoma_pl.AlterMOMACallback\n"
        + "      init_args:\n"
        + "        modalities: {camera: [camera], lidar: lidar}\n"
        + "        sparsity: 0.8\n"
        + "        criterion: {class_path: Magnitude}\n"
        + "        schedule: {class_path: Cubic, init_args: {end: 1}}\n"
    )
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "train.py", "fit", "--config", "stock.yaml"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Pruned before epoch 1" in ran.stdout
    state = pruning_state_of(saved(folder))
    assert [round(120 * event["sparsity"]) for event in state.events] == [84, 96]
    assert (folder / "lightning_logs" / "version_0" / "pruning" / "kept_per_layer.png").exists()
