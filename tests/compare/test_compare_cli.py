"""`altermoma compare`: a comparison from YAML and flags, errors in one line."""

import sys

import pytest

from altermoma_pl import Magnitude, OneShot, Random
from altermoma_pl.cli import main
from altermoma_pl.compare import Method
from altermoma_pl.compare import runner as runner_module
from tests.helpers.toy import strict_json

CONFIG = """
benchmark: {class_path: tests.helpers.toy.Toy, init_args: {width: 9}}
methods:
  magnitude: {criterion: altermoma_pl.Magnitude}
  late:
    criterion: {class_path: Random}
    schedule: {class_path: OneShot, init_args: {epoch: 1}}
    num_epochs: 3
sparsities: [0.5]
seeds: 1
schedule: {class_path: altermoma_pl.OneShot}
num_epochs: 2
output_dir: out
"""
BROKEN = CONFIG.replace("altermoma_pl.Magnitude", "tests.helpers.toy.Failing")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def failure(capsys, *arguments, code):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config=config.yaml", *arguments])
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_a_comparison_from_a_file_in_a_log(folder, capsys):
    main(["compare", "--config=config.yaml"])
    written = capsys.readouterr()
    assert written.err.splitlines() == [
        "dense models: 0 of 1 are done",
        "dense models: 1 of 1 are done, 0:00:00 left",
        "cells: 0 of 2 are done",
        "cells: 2 of 2 are done, 0:00:00 left",
    ]
    assert "loss at 50% sparsity, lower is better" in written.out
    assert written.out.splitlines()[-1] == "Tables and figures are in out"
    found = strict_json((folder / "out" / "summary.json").read_text())
    assert found["reference"] == "magnitude"
    epochs = {e["method"]: e["mean"] for e in found["results"] if e["name"] == "epochs"}
    assert epochs == {"magnitude": 2, "late": 3}
    assert (folder / "out" / "figures" / "kept_share.png").is_file()
    main(["compare", "--config=config.yaml"])
    assert capsys.readouterr().err.splitlines() == ["dense models: 1 of 1 are done", "cells: 2 of 2 are done"]


def test_flags_override_the_file(capsys):
    main(["compare", "--config=config.yaml", "--seeds=2", "--shard=1/2", "--num_epochs=1"])
    assert capsys.readouterr().out == "2 of 4 cells are left to other shards.\n"


def test_options_reach_the_comparison(monkeypatch):
    seen = {}

    def note(grid, store, cells, jobs):
        seen.update(grid=grid, jobs=jobs)
        return {}

    monkeypatch.setattr(runner_module, "_run", note)
    main(["compare", "--config=config.yaml", "--seeds=[3,5]", "--jobs=4", "--threads=2", "--scope=layer"])
    grid = seen["grid"]
    assert grid.methods["magnitude"] == Method(Magnitude(), OneShot(), 2, "layer", 0.01, "weight")
    assert grid.methods["late"] == Method(Random(), OneShot(1), 3, "layer", 0.01, "weight")
    assert (grid.benchmark.width, grid.seeds, grid.sparsities) == (9, (3, 5), (0.5,))
    assert (grid.threads, seen["jobs"]) == (2, 4)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Start it again after a stop or a kill, and it goes on where it was." in text
    assert "How many, from 0, or which." in text
    assert "Args:" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference=snip"], "reference 'snip' is no method: the methods are ['magnitude', 'late']"),
        (["--shard=2/1"], "shard must be i/n with 1 <= i <= n, for example 2/8, got '2/1'"),
        (["--sparsities=[1.5]"], "sparsity must be a share of zeros in [0, 1), got 1.5"),
    ],
)
def test_a_bad_option_gives_one_line(arguments, message, capsys):
    assert failure(capsys, *arguments, code=1) == f"altermoma compare: error: {message}\n"


def test_failed_cells_give_one_line_each_and_no_usage(folder, capsys):
    (folder / "config.yaml").write_text(BROKEN)
    text = failure(capsys, code=1)
    assert "usage" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("altermoma compare: error: ")]
    assert "1 of the runs failed, first magnitude at sparsity 0.5, seed 0: ArithmeticError" in line
    assert line.endswith("tracebacks are in out/failures-1-of-1.txt. Mend the cause and start again")


def test_a_cluster_that_cannot_be_reached_gives_one_line(monkeypatch, capsys):
    def unreachable(*arguments):
        raise OSError("Timed out trying to connect to tcp://cluster:8786 after 30 s")

    monkeypatch.setattr(runner_module, "_run", unreachable)
    text = failure(capsys, code=1)
    assert text == "altermoma compare: error: Timed out trying to connect to tcp://cluster:8786 after 30 s\n"


def test_an_unknown_option_names_itself(capsys):
    assert "sedes" in failure(capsys, "--sedes=3", code=2)


def test_without_scipy_it_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("altermoma_pl.compare")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    text = failure(capsys, code=1)
    assert text == "altermoma compare needs scipy.stats: pip install 'altermoma-pl[compare]'\n"
