"""The picture of the house: rooms in rows, imports go strictly down, Lightning stays at the top."""

import ast
import re
from pathlib import Path

import pytest

import altermoma_pl

PACKAGE = Path(altermoma_pl.__file__).parent
NAME = "altermoma_pl"
ROWS = [  # lowest first; a room is a folder or a file of the package
    {"model", "metrics"},
    {"mask"},
    {"score", "enforce"},
    {"granularity", "report"},
    {"callback", "plain_torch"},
    {"export", "compare"},
    {"cli"},
]
FLOOR = {room: floor for floor, row in enumerate(ROWS) for room in row}
MAY_IMPORT = {
    **dict.fromkeys(["lightning", "pytorch_lightning"], ("callback", "export", "cli")),
    # They come with the extra `compare`: nothing else may need them.
    **dict.fromkeys(["joblib", "pandas", "scipy"], ("compare",)),
}


def imports_of(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


def imported(path):
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        else:
            yield from (alias.name for alias in node.names)


def files_of(package):
    """Room -> path, of all but the face of the package, which only hands names on."""
    for path in sorted(package.rglob("*.py")):
        if path != package / "__init__.py":
            yield path.relative_to(package).with_suffix("").parts[0], path


def violations(package):
    for room, path in files_of(package):
        if room not in FLOOR:
            yield f"{room} is in no row"
            continue
        for name in imported(path):
            top, _, below = name.partition(".")
            target = below.partition(".")[0]
            if name.startswith("."):
                yield f"{room} imports relatively"
            elif room not in MAY_IMPORT.get(top, FLOOR):
                yield f"{room} imports {top}"
            elif name == NAME and room == "cli":
                continue  # the roof: it may ask the face for the version
            elif top == NAME and target != room and FLOOR.get(target, len(ROWS)) >= FLOOR[room]:
                yield f"{room} imports {target or 'the face'}"


def test_imports_go_down():
    assert list(violations(PACKAGE)) == []


def test_each_room_stands_in_one_row():
    assert len(FLOOR) == sum(map(len, ROWS)) == len({room for room, _ in files_of(PACKAGE)})
    assert len(ROWS) <= 8


def test_the_picture_of_the_house_is_that_of_the_layering_test():
    text = (PACKAGE.parent / "examples" / "guides" / "internals.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \|$", text, re.MULTILINE)
    expected = [
        (str(floor), ", ".join(f"`{room}`" for room in sorted(row))) for floor, row in enumerate(ROWS, 1)
    ]
    assert rows == expected


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("mask/masks.py", "from altermoma_pl.callback import AlterMOMACallback", "mask imports callback"),
        ("mask/masks.py", "def f():\n    import lightning.pytorch as pl", "mask imports lightning"),
        ("score/new.py", "from pytorch_lightning import Callback", "score imports pytorch_lightning"),
        ("report/new.py", "def f():\n    import pandas as pd", "report imports pandas"),
        ("score/new.py", "from scipy.stats import sem", "score imports scipy"),
        ("score/new.py", "from altermoma_pl.enforce.copies import copies", "score imports enforce"),
        ("mask/masks.py", "from altermoma_pl import Modalities", "mask imports the face"),
        ("mask/masks.py", "from .top_k import top_k", "mask imports relatively"),
        ("mask/masks.py", "import altermoma_pl.helpers", "mask imports helpers"),
        ("helpers.py", "", "helpers is in no row"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line, expected):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert list(violations(tmp_path)) == [expected]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("callback/hooks.py", "import lightning\nfrom altermoma_pl.callback.state import State"),
        ("cli.py", "from lightning.pytorch.cli import LightningCLI\nimport altermoma_pl.export.costs"),
        ("score/new.py", "from altermoma_pl.score.criterion import Criterion\nimport torch"),
        ("compare/new.py", "import pandas as pd\nfrom joblib import Parallel\nfrom scipy.stats import sem"),
        ("__init__.py", "from altermoma_pl.callback import AlterMOMACallback"),
    ],
)
def test_what_goes_down_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert list(violations(tmp_path)) == []


def modules_of_tests(path):
    """Also `from tests.mask import test_masks`, which names the module last."""
    for node in imports_of(path):
        names = (f"{getattr(node, 'module', None) or ''}.{alias.name}" for alias in node.names)
        yield from (name for name in names if ".test_" in name)


def test_what_tests_share_is_a_helper():
    """A test module imports no other one: each can move or go by itself."""
    here = Path(__file__).parent
    assert [name for path in here.rglob("*.py") for name in modules_of_tests(path)] == []
