"""Workers: what they are sent, what they leave as it was, and a cluster instead of processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import joblib
import pytest
import torch

from altermoma_pl.compare import Method, compare
from altermoma_pl.compare.attempts import attempt
from tests.helpers.toy import METHODS, OPTIONS, Failing, Toy, notes, tables

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os
from dataclasses import dataclass
from altermoma_pl import Magnitude, OneShot
from altermoma_pl.compare import Method, compare
from beside import Doubled
from tests.helpers.toy import Toy

@dataclass(frozen=True)
class Mine(Toy):
    def train_dense(self, seed, folder):
        return super().train_dense(seed, folder) | {"here": os.getppid() != PARENT}

PARENT = os.getpid()
compare(Mine(), {"doubled": Method(Doubled())}, [0.5], 2, schedule=OneShot(), num_epochs=1, jobs=2)
"""
BESIDE = """
from dataclasses import dataclass
from altermoma_pl import Magnitude

@dataclass(frozen=True)
class Doubled(Magnitude):
    pass
"""


@pytest.mark.slow
def test_classes_of_a_script_and_of_its_folder_reach_the_workers(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text(BESIDE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True)
    found = (tmp_path / "runs" / "compare" / "results.csv").read_text()
    assert "dense,0.0,0,here,0.0\ndense" in found
    assert "doubled,0.5,1,loss," in found


def test_tasks_in_threads_wait_for_each_other():
    inside, most = [], []

    def task():
        inside.append(torch.get_num_threads())
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()

    before = torch.get_num_threads()
    with joblib.parallel_config("threading"):
        found = list(attempt(dict.fromkeys("abcd", task), 4, before + 1))
    assert sorted(found) == [(name, None) for name in "abcd"]
    assert most == [1, 1, 1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_bytes(tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    compare(Toy(), METHODS, output_dir=str(tmp_path / "here"), **OPTIONS)
    toy = Toy(diary=str(tmp_path / "diary"))
    options = {"output_dir": str(tmp_path / "there"), **OPTIONS}
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        with pytest.raises(RuntimeError, match=r"^4 of the runs failed, first broken at .*no score today"):
            compare(
                toy, METHODS | {"broken": Method(Failing())}, backend="dask",
                backend_options={"client": client}, **options,
            )  # fmt: skip
        assert len(notes(tmp_path / "diary")) == 2 + 8 + 4
        with joblib.parallel_config("dask"):
            compare(toy, METHODS, **options | {"output_dir": str(tmp_path / "there again")})
    compare(toy, METHODS, **options)
    assert len(notes(tmp_path / "diary")) == 2 * (2 + 8) + 4
    expected = tables(tmp_path / "here")
    assert tables(tmp_path / "there") == tables(tmp_path / "there again") == expected


def test_a_backend_that_nobody_knows_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="Invalid backend: clowd, expected one of"):
        compare(Toy(), METHODS, backend="clowd", output_dir=str(tmp_path / "out"), **OPTIONS)
    assert list(tmp_path.iterdir()) == []
