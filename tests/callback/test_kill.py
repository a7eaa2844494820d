"""SIGKILL at any moment: nothing is lost but the time since the last checkpoint."""

import multiprocessing
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from altermoma_pl.callback.state import PruningState
from tests.helpers.kill_child import OUTCOME, PHASES, SCHEDULE, child, run
from tests.helpers.lightning_models import NUM_WEIGHTS, Fusion, assert_same
from tests.helpers.resuming import KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has imported everything: a start takes milliseconds instead of seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.kill_child"])
    return context


@pytest.fixture(scope="module")
def expected(processes, tmp_path_factory):
    """What comes out of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    process = processes.Process(target=run, args=(folder,))
    process.start()
    process.join()
    return torch.load(folder / OUTCOME, weights_only=True)


class Killer:
    """Kills at seeded moments of each phase in turn, and counts."""

    def __init__(self, processes, folder: Path, expected, seed: int) -> None:
        self.processes, self.folder, self.expected = processes, folder, expected
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.mismatches: list[str] = []
        self.runs = self.checkpoints = 0

    def kill(self, times: int) -> None:
        """Runs that are killed and go on until they end, until there were so many kills."""
        while self.kills.total() < times:
            self.runs += 1
            assert self.runs <= 5 * times, f"some phase is never announced: {self}"
            folder = self.folder / f"run{self.runs}"
            while not (folder / OUTCOME).exists():
                self._attempt(folder, self._next_phase() if self.kills.total() < times else None)
                self._check_checkpoints(folder)
            self._check_outcome(folder)

    def _next_phase(self) -> str:
        fewest = min(self.kills[phase] for phase in PHASES)
        return self.random.choice([phase for phase in PHASES if self.kills[phase] == fewest])

    def _attempt(self, folder: Path, phase: str | None) -> None:
        """Go on with the run until it ends or, somewhere in the phase, is killed."""
        receives, sends = self.processes.Pipe(duplex=False)
        process = self.processes.Process(target=child, args=(folder, sends))
        process.start()
        sends.close()
        countdown = self.random.randint(1, {"training": 9, "scoring": 30, "saving": 20}.get(phase, 1))
        for heard in iter(receives.recv, "done"):
            countdown -= heard == phase
            if countdown == 0:
                time.sleep(self.random.uniform(0, 0.003))
                process.kill()
                break
        process.join()
        assert process.exitcode in (0, -9)
        if process.exitcode:
            self.kills[phase] += 1

    def _check_checkpoints(self, folder: Path) -> None:
        """Everything on disk loads, and its weights are zero exactly where its masks prune."""
        for path in folder.glob("*.ckpt"):
            self.checkpoints += 1
            checkpoint = torch.load(path, weights_only=True)
            plain = Fusion()
            plain.load_state_dict(checkpoint["state_dict"], strict=True)
            state = PruningState.from_state_dict(checkpoint["callbacks"][KEY])
            zeros = sum(int((plain.get_parameter(n) == 0).sum()) for n in state.masks)
            agree = all(torch.equal(plain.get_parameter(n) != 0, m) for n, m in state.masks.items())
            if not agree or zeros != round(state.events[-1]["sparsity"] * NUM_WEIGHTS):
                self.mismatches.append(f"{path}: {zeros} zeros, {state.masks}, {state.events[-1]}")

    def _check_outcome(self, folder: Path) -> None:
        try:
            assert_same(torch.load(folder / OUTCOME, weights_only=True), self.expected)
        except AssertionError as error:
            self.mismatches.append(f"{folder}: {error}")

    def __str__(self) -> str:
        where = ", ".join(f"{phase} {self.kills[phase]}" for phase in PHASES)
        return (
            f"{self.kills.total()} kills ({where}) in {self.runs} runs; {self.checkpoints} times a "
            f"checkpoint was read; mismatches: {len(self.mismatches)}"
        )


def test_the_uninterrupted_run_has_three_events(expected):
    assert [event["epoch"] for event in expected["pruning"]["events"]] == [0, 2, 4]
    assert expected["pruning"]["events"][-1]["sparsity"] == pytest.approx(0.8)
    assert SCHEDULE.last_epoch == 4


def test_a_killed_run_goes_on_as_if_nothing_had_been(processes, tmp_path, expected):
    killer = Killer(processes, tmp_path, expected, seed=0)
    killer.kill(len(PHASES))
    assert killer.mismatches == []
    assert killer.kills == dict.fromkeys(PHASES, 1)
    assert killer.checkpoints > 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(processes, tmp_path, expected, seed):
    killer = Killer(processes, tmp_path, expected, seed)
    started = time.perf_counter()
    killer.kill(40)
    print(f"\nseed {seed}: {killer}; {time.perf_counter() - started:.0f} s")  # noqa: T201
    assert killer.mismatches == []
    assert all(killer.kills[phase] >= 6 for phase in PHASES)
