"""Imports go strictly downwards, and Lightning stays in two places."""

import ast
from pathlib import Path

import pytest

import altermoma_pl

ROOT = "altermoma_pl"
LAYERS = [  # lowest first; a file of a folder that is not named belongs to its folder
    {"options", "distributed"},
    {"modality", "masks", "schedules", "metrics"},
    {"contexts", "radix"},
    {"export"},
    {"selection"},
    {"sparsity"},
    {"patterns"},
    {"criteria.finite", "criteria.computed", "criteria.components", "criteria.options", "criteria.graph"},
    {"criteria.base"},
    {"criteria.simple", "criteria.reactivation", "criteria.linearized", "criteria.combination"},
    {"criteria.altereva", "criteria.gradient", "criteria.curvature", "criteria.synflow", "criteria.wanda"},
    {"criteria.grasp", "criteria.prospr", "criteria.beta"},
    {"criteria"},
    {"report", "structured", "semi_structured"},
    {"figures", "granularity", "costs"},
    {"callback"},
    {"compare.benchmark", "compare.statistics", "compare.workers"},
    {"compare.grid", "compare.progress"},
    {"compare.summary"},
    {"compare.figures"},
    {"compare.runner"},
    {"compare"},
    {""},  # altermoma_pl itself
    {"checkpoints"},
    {"exporting"},
    {"cli"},
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
MAY_IMPORT_LIGHTNING = {"callback", "exporting", "cli"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def unit(name):
    """The entry of the table that a dotted name below the package belongs to, or None."""
    parts = name.split(".")
    candidates = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((candidate for candidate in candidates if candidate in RANK), None)


def violations(package):
    for path in sorted(package.rglob("*.py")):
        parts = [*path.relative_to(package).with_suffix("").parts]
        module = unit(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        if module is None:
            yield f"{path.name} is not in the table"
            continue
        for name in imported(path):
            top, _, below = name.partition(".")
            if name.startswith("."):
                yield f"{module} imports relatively"
            elif top in ("lightning", "pytorch_lightning") and module not in MAY_IMPORT_LIGHTNING:
                yield f"{module} imports {top}"
            elif top == ROOT:
                target = unit(below)
                if target is None:
                    yield f"{module} imports {name}, which is not in the table"
                elif target != module and RANK[target] >= RANK[module]:
                    yield f"{module} imports {target}"


def test_imports_go_down():
    assert list(violations(Path(altermoma_pl.__file__).parent)) == []


def test_each_module_stands_in_one_row():
    assert len(RANK) == sum(map(len, LAYERS))


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("masks.py", "from altermoma_pl.callback import AlterMOMACallback", "masks imports callback"),
        ("masks.py", "def f():\n    import lightning.pytorch as pl", "masks imports lightning"),
        ("criteria/new.py", "from pytorch_lightning import Callback", "criteria imports pytorch_lightning"),
        ("masks.py", "from altermoma_pl.modality import Modalities", "masks imports modality"),
        ("masks.py", "from altermoma_pl import Modalities", "masks imports "),
        ("masks.py", "from .modality import Modalities", "masks imports relatively"),
        (
            "masks.py",
            "import altermoma_pl.helpers",
            "masks imports altermoma_pl.helpers, which is not in the",
        ),
        ("helpers.py", "", "helpers.py is not in the table"),
        ("criteria/base.py", "from altermoma_pl.criteria import AlterEva", "criteria.base imports criteria"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, expected):
    (tmp_path / "criteria").mkdir()
    (tmp_path / file).write_text(line)
    (found,) = violations(tmp_path)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("callback/hooks.py", "import lightning\nfrom altermoma_pl.callback.state import State"),
        ("cli.py", "from lightning.pytorch.cli import LightningCLI\nfrom altermoma_pl import AlterEva"),
        ("criteria/new.py", "from altermoma_pl.criteria.base import Criterion\nimport torch"),
        ("__init__.py", "from altermoma_pl.callback import AlterMOMACallback"),
    ],
)
def test_what_goes_down_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert list(violations(tmp_path)) == []
