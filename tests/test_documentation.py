"""README and guides: their code runs, their links lead somewhere, their YAML prunes."""

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from altermoma_pl import Magnitude
from tests.helpers.lightning_models import NUM_WEIGHTS, Data, Fusion, fit, num_zeros, pruner

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples" / "guides").glob("*.md")), ROOT / "examples" / "RESULTS.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def name(page):
    return page.stem


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs_in_the_order_of_reading(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_yaml_blocks_are_read(tmp_path):
    for page in PAGES:
        for text in blocks(page, "yaml"):
            assert isinstance(yaml.safe_load(text), dict), page


def test_the_yaml_of_the_readme_prunes(tmp_path, monkeypatch):
    """In a LightningCLI that knows nothing of this package, on a model with other module paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (text,) = blocks(README, "yaml")
    content = yaml.safe_load(text)
    (callback,) = content["trainer"]["callbacks"]
    callback["init_args"]["modalities"] = {"camera": ["camera"], "lidar": ["lidar"]}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    content["trainer"] |= {"accelerator": "cpu", **dict.fromkeys(quiet, False)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(Fusion, Data, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    assert num_zeros(cli.model) == 0.9 * NUM_WEIGHTS


def test_the_schedule_of_the_guide_reacts_to_the_validation_loss():
    """Of a model that learns nothing: a step after two epochs without a gain, the rest at the deadline."""

    class Flat(Fusion):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    scope = {"__name__": "training"}
    for code in blocks(ROOT / "examples" / "guides" / "training.md", "python"):
        exec(code, scope)
    pruning = pruner(schedule=scope["AtEpochs"](epochs=(7,)), criterion=Magnitude(), store_components=False)
    feeder = scope["OnPlateau"](pruning)
    fit(Flat(), pruning, feeder, max_epochs=8)
    assert [event["epoch"] for event in pruning.events] == [3, 6, 7]
    assert pruning.report().sparsity == 0.5
    again = scope["OnPlateau"](pruner(schedule=scope["AtEpochs"](epochs=(6,))))
    again.load_state_dict(feeder.state_dict())
    assert again.pruning.schedule.epochs == (3, 6, 7)


def test_the_readme_is_a_first_page():
    text = README.read_text()
    assert len(text.encode()) <= 7500
    assert [line for line in text.splitlines() if len(line) > 120] == []
    prose = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", BLOCK.sub("", text))
    assert re.findall(r"\([^()]*\([^()]*\)[^()]*\)", re.sub(r"`[^`]*`", "", prose)) == []


def test_every_public_name_has_a_docstring():
    tree = ast.parse((ROOT / "altermoma_pl" / "__init__.py").read_text())
    import altermoma_pl

    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(altermoma_pl.__all__) == sorted(set(names) & set(altermoma_pl.__all__))
    assert [n for n in altermoma_pl.__all__ if not (getattr(altermoma_pl, n).__doc__ or "").strip()] == []
