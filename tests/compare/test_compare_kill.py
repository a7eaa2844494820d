"""A comparison that is killed and started again ends with the tables of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.toy import METHODS, OPTIONS, Toy, notes, tables

ROOT = Path(__file__).parents[2]
CONFIG = """
benchmark: {{class_path: tests.helpers.toy.Toy, init_args: {{diary: {folder}/diary, pause: {pause}}}}}
methods:
  magnitude: {{criterion: Magnitude}}
  random: {{criterion: Random}}
sparsities: [0.5, 0.75]
seeds: 2
schedule: {{class_path: OneShot}}
num_epochs: 2
min_density: 0.0
output_dir: {folder}/out
"""


def start(folder, jobs, pause=0.0):
    """The command line in a process group of its own."""
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, pause=pause))
    code = "from altermoma_pl.cli import main; main()"
    command = [sys.executable, "-c", code, "compare", f"--config={folder}/config.yaml", f"--jobs={jobs}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def wait_for(condition, process):
    end = time.monotonic() + 240  # a loaded machine takes minutes to start processes
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def restart(folder):
    """Start again, here, and end."""
    from altermoma_pl.compare import compare

    compare(Toy(diary=str(folder / "diary")), METHODS, output_dir=str(folder / "out"), **OPTIONS)


def num_cells(folder):
    return len(list((folder / "out" / "cells").glob("[!.]*")))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    restart(folder)
    return tables(folder / "out")


@pytest.mark.parametrize(
    ("jobs", "cells"),
    [
        (1, 3),
        pytest.param(1, 0, marks=pytest.mark.soak),
        pytest.param(1, 7, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.soak),
        pytest.param(2, 5, marks=pytest.mark.slow),
    ],
)
def test_killed_after_some_cells(jobs, cells, tmp_path, expected):
    process = start(tmp_path, jobs, pause=0.3)
    dense = tmp_path / "out" / "dense"
    wait_for(
        lambda: len(list(dense.glob("seed*/values.json"))) == 2 and num_cells(tmp_path) >= cells, process
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = num_cells(tmp_path)
    assert cells <= done < 8
    before = len(notes(tmp_path / "diary")) if done else 2
    restart(tmp_path)
    assert tables(tmp_path / "out") == expected
    assert len(notes(tmp_path / "diary")) >= before + 8 - done - jobs
    assert len([line for line in notes(tmp_path / "diary") if line.startswith("dense")]) == 2


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_while_a_dense_model_trains(jobs, tmp_path, expected):
    process = start(tmp_path, jobs, pause=30)
    dense = tmp_path / "out" / "dense"
    wait_for(lambda: list(dense.glob(".seed*/half.pt")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(dense.glob("seed*-????????????"))
    restart(tmp_path)
    assert tables(tmp_path / "out") == expected
    assert not list(dense.glob(".seed*-????????????"))


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    process = start(tmp_path, jobs=2, pause=600)
    wait_for(lambda: (tmp_path / "diary").exists() and len(notes(tmp_path / "diary")) == 2, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not group_is_gone(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    gone = group_is_gone(process.pid)
    if not gone:
        os.killpg(process.pid, signal.SIGKILL)
    assert gone
