"""The bar while scoring, beside each of Lightning's."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from altermoma_pl.callback import lightning_internals
from altermoma_pl.callback.lightning_internals import scoring_bar
from tests.helpers.lightning_models import Fusion, fit, num_zeros, pruner, short, trainer

PHASES = (
    "contribution",
    "camera deactivated",
    "camera deactivated, reactivation",
    "camera deactivated, reactivated",
    "lidar deactivated, reactivated",
)


def test_tqdm_shows_each_phase(capsys):
    fit(Fusion(), pruner(), TQDMProgressBar(), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert all(f"Scoring: {phase}" in out for phase in PHASES)


def test_rich_shows_each_phase_and_removes_it(capsys):
    phases: list[str] = []

    class Watched(RichProgressBar):
        def _init_progress(self, trainer: Any) -> None:
            super()._init_progress(trainer)
            add = self.progress.add_task

            def recorded(description: str, *args: Any, **kwargs: Any) -> Any:
                phases.append(description)
                return add(description, *args, **kwargs)

            self.progress.add_task = recorded

    bar, module = Watched(), Fusion()
    fit(module, pruner(), bar, enable_progress_bar=True)
    assert [f"Scoring: {phase}" in phases for phase in PHASES] == [True] * len(PHASES)
    assert num_zeros(module) == 60


class Fails(Fusion):
    def pruning_loss(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("in the loss")
        return self.loss(batch)


def test_tqdm_is_closed_also_after_an_error(monkeypatch):
    class Recorded(Tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self) -> None:
            closed.add(id(self))
            super().close()

    made: list[Any] = []
    closed: set[int] = set()
    monkeypatch.setattr(lightning_internals, "Tqdm", Recorded)
    fit(Fusion(), pruner(), TQDMProgressBar(), enable_progress_bar=True)
    assert (len(made), len(closed)) == (7, 7)  # phases
    with pytest.raises(RuntimeError, match="in the loss"):
        fit(Fails(), pruner(), TQDMProgressBar(), enable_progress_bar=True)
    assert (len(made), len(closed)) == (8, 8)


def test_rich_has_no_task_left_also_after_an_error():
    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            tasks.append([task.description for task in bar.progress.tasks])

        def on_exception(self, *_: Any) -> None:
            tasks.append([task.description for task in bar.progress.tasks])

    tasks: list[list[str]] = []
    bar = RichProgressBar()
    fit(Fusion(), pruner(), bar, Look(), enable_progress_bar=True)
    assert len(tasks) == 12
    bar = RichProgressBar()
    with pytest.raises(RuntimeError, match="in the loss"):
        fit(Fails(), Look(), pruner(), bar, enable_progress_bar=True)
    assert len(tasks) == 12 + 4 + 1
    assert not [name for each in tasks for name in each if "Scoring" in name]


def test_a_bar_of_the_users_own_is_left_alone(capsys):
    class Own(ProgressBar):
        pass

    module = Fusion()
    fit(module, pruner(), Own(), enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "Scoring" not in out
    assert "Pruned before epoch 1" in out
    assert num_zeros(module) == 60


def test_without_a_bar_nothing_is_shown(capsys):
    fit(Fusion(), pruner(criterion=short()))
    captured = capsys.readouterr()
    assert "Scoring" not in captured.out + captured.err


def test_a_disabled_bar_shows_nothing(capsys):
    fit(Fusion(), pruner(), TQDMProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert "Scoring" not in capsys.readouterr().out


def test_scoring_bar_without_a_trainers_bar_yields_nothing():
    with scoring_bar(trainer()) as show:
        assert show("contribution", 0, 1) is None
        assert show("phase", 0, None) is None


def showing(bar: Any) -> Any:
    """What of a Trainer with this bar is looked at."""
    return SimpleNamespace(progress_bar_callback=bar, received_sigterm=False, world_size=1)


def test_tqdm_counts_up_and_restarts_with_each_phase(capsys, monkeypatch):
    class Recorded(Tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    made: list[Any] = []
    monkeypatch.setattr(lightning_internals, "Tqdm", Recorded)
    with scoring_bar(showing(TQDMProgressBar())) as show:
        show("first", 0, 3)
        show("first", 2, 3)
        assert [(each.n, each.total) for each in made] == [(2, 3)]
        show("second", 1, None)
        assert [(each.n, each.total) for each in made] == [(2, 3), (1, None)]
        assert [each.disable for each in made] == [True, False]
    assert [each.disable for each in made] == [True, True]  # as closed ones are
    assert "Scoring: second" in capsys.readouterr().out


def test_rich_counts_up_and_restarts_with_each_phase():
    from rich.progress import Progress

    bar, shown = RichProgressBar(), Progress(disable=True)
    bar.progress = shown
    with scoring_bar(showing(bar)) as show:
        show("first", 2, 3)
        assert [(task.description, task.completed, task.total) for task in shown.tasks] == [
            ("Scoring: first", 2, 3)
        ]
        show("second", 1, None)
        assert [(task.description, task.completed) for task in shown.tasks] == [("Scoring: second", 1)]
        assert shown.tasks[0].total == float("inf")
    assert shown.tasks == []
