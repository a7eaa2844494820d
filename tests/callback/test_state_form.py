"""Every part of a saved state, damaged in every way: refused with a message, or without effect."""

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from altermoma_pl import AlterMOMACallback, Linear, Rewinding
from altermoma_pl.mask.schedules import Schedule
from tests.helpers.lightning_models import assert_same, fit, loader, pruner, trainer
from tests.helpers.resuming import KEY, Steady, checkpoints

Path_ = tuple[Any, ...]
POINT: dict[str, Any] = {"epoch": 0, "parameters": {}, "buffers": {}, "optimizers": [], "schedulers": []}
SCHEDULES = {"gradual": Linear(0, 2), "rewinding": Rewinding(3, 1, 0)}
MAX_EPOCHS = 4


class Scheduled(Steady):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


class Resumes:
    """A checkpoint between the second and the third event, how to resume from it, and what comes out."""

    def __init__(self, folder: Path, schedule: Schedule) -> None:
        self.folder, self.schedule = folder, schedule
        module, options = Scheduled(), {"max_epochs": MAX_EPOCHS, "enable_checkpointing": True}
        fit(module, self.build(), checkpoints(folder), **options)
        self.checkpoint = torch.load(folder / "epoch=1-step=8.ckpt", weights_only=True)
        self.expected = self.outcome(self.state)

    def build(self) -> AlterMOMACallback:
        return pruner(sparsity=0.5, schedule=self.schedule)

    @property
    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.checkpoint["callbacks"][KEY])

    def outcome(self, state: Any) -> dict[str, Any]:
        """Final weights and masks of a run that is resumed with the state."""
        module, callback = self.fit(state)
        return {"weights": dict(module.state_dict()), "masks": dict(callback.masks)}

    def fit(self, state: Any, *more: Callback) -> tuple[Any, AlterMOMACallback]:
        path, module, callback = self.folder / "damaged.ckpt", Scheduled(), self.build()
        torch.save({**self.checkpoint, "callbacks": {KEY: state}}, path)
        trainer(callback, *more, max_epochs=MAX_EPOCHS).fit(
            module, loader(), loader(seed=1), ckpt_path=path, weights_only=False
        )
        return module, callback


@pytest.fixture(scope="module")
def gradual(tmp_path_factory):
    return Resumes(tmp_path_factory.mktemp("gradual"), SCHEDULES["gradual"])


@pytest.fixture(scope="module")
def rewinding(tmp_path_factory):
    return Resumes(tmp_path_factory.mktemp("rewinding"), SCHEDULES["rewinding"])


@pytest.fixture(params=SCHEDULES)
def saved(request):
    return request.getfixturevalue(request.param)


def nodes(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of nested dictionaries and lists, containers too."""
    yield path, value
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(each, (*path, key))


def damages(value: Any) -> Iterator[Any]:
    """Other values in the place of one."""
    yield from (
        None,
        "x",
        -2,
        1.5,
        math.nan,
        True,
        [],
        {},
        [None],
        {"x": 1},
        {3: torch.zeros(2)},
        torch.ones(3, 5),
    )
    if isinstance(value, torch.Tensor):
        yield from (
            value.to(torch.int16),
            value.new_zeros(value.numel() + 1),
            value[None],
            value.new_zeros(0),
        )
    elif isinstance(value, dict):
        yield from ({**value, "extra": None}, {**value, 7: None})
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield {f"{k}_" if k == key else k: v for k, v in value.items()}
    elif isinstance(value, list):
        yield from (value[1:], [*value, None], [*value, *value])
    elif isinstance(value, str):
        yield from ("camera" if value == "lidar" else "lidar", "", value + "_")


def put(state: Any, path: Path_, value: Any) -> Any:
    """The state with another value at the path; what is not on the path is shared."""
    if not path:
        return value
    changed = copy.copy(state)
    changed[path[0]] = put(state[path[0]], path[1:], value)
    return changed


def plausible(value: Any, damage: Any) -> bool:
    """Whether nothing can tell the damage from what might have been: a number is another number."""
    numbers = [isinstance(each, (int, float)) and not math.isnan(each) for each in (value, damage)]
    return (numbers[0] or value is None) and numbers[1]


class Tries(Callback):
    """Gives every damaged state to a callback of its own, and lets that start the fit."""

    def __init__(self, saved: Resumes) -> None:
        self.saved = saved
        self.refused: list[str] = []
        self.accepted: list[tuple[Path_, Any]] = []
        self.wrong: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = copy.deepcopy(pl_module.state_dict())
        state = self.saved.state
        for path, value in nodes(state):
            for damage in damages(value):
                if not plausible(value, damage):
                    self._try(trainer, pl_module, path, put(state, path, damage), damage)
        assert_same(pl_module.state_dict(), self.before)

    def _try(self, trainer: Any, module: Any, path: Path_, damaged: Any, damage: Any) -> None:
        callback = self.saved.build()
        state = callback._held.state
        try:
            callback.load_state_dict(damaged)
            state = callback._held.state
            callback.on_fit_start(trainer, module)
            callback.on_train_start(trainer, module)
            self.accepted.append((path, damage))
        except ValueError as error:
            self.refused.append(str(error))
            if not all(getattr(callback._held.state, name) == value for name, value in vars(state).items()):
                self.wrong.append(f"{path} = {damage!r:.60} changed the state: {error}")
        except Exception as error:
            self.wrong.append(f"{path} = {damage!r:.60}: {error!r}")
        callback.on_exception(trainer, module, RuntimeError())


@pytest.mark.slow
def test_every_damage_is_refused_or_without_effect(saved):
    tries = Tries(saved)
    saved.fit(saved.state, tries)
    assert tries.wrong == []
    assert len(tries.refused) > 1000
    assert min(map(len, tries.refused)) > 60  # what is wrong, and what to do
    history = ("events", "components")
    for path, damage in [each for each in tries.accepted if each[0][:1] not in [(key,) for key in history]]:
        assert_same(saved.outcome(put(saved.state, path, damage)), saved.expected, f"{path} = {damage!r:.60}")


def test_the_history_has_no_effect(saved):
    """What is recorded of earlier events is for the user alone, so another plausible number is harmless."""
    state = saved.state
    state["components"] = None
    for event in state["events"]:
        event |= {"losses": {"all": -1.0}, "kept": {"camera": 0.3}, "more": None}
    assert_same(saved.outcome(state), saved.expected)


@pytest.mark.parametrize(
    ("path", "damage", "message"),
    [
        (
            (),
            None,
            "state must be a dictionary by name, got None; resume from another checkpoint, or start a new",
        ),
        (
            ("format",),
            "2",
            "has format '2', this version reads 2: resume with the version of altermoma_pl that",
        ),
        (("masks",), "x", "state.masks must be a dictionary by name, got 'x'"),
        (
            ("masks", "head.weight", "shape"),
            [1, -8],
            "masks.head.weight.shape.1 must be a whole number of at",
        ),
        (("masks", "head.weight", "bits"), None, "state.masks.head.weight.bits must be a tensor, got None"),
        (
            ("masks", "head.weight", "bits"),
            torch.full((1,), 255, dtype=torch.uint8),
            "masks prune a share of",
        ),
        (("group_of",), [], "state.group_of must be a dictionary by name, got []"),
        (("last_event_epoch",), -2, "last_event_epoch must be a whole number of at least -1, got"),
        (("events",), {}, "state.events must be a list, got {}"),
        (("events", 0), 3, "state.events.0 must be a dictionary by name, got 3"),
        (("events", 0), {"epoch": 0}, "state.events.0 must hold ['epoch', 'kept', 'losses',"),
        (("events", 0, "epoch"), True, "events.0.epoch must be a whole number of at least 0, got"),
        (("events", 0, "losses"), [], "events.0.losses must be a dictionary by name, got []"),
        (("events", 0, "losses", "all"), "low", "events.0.losses.all must be a number, got 'low'"),
        (
            ("events", 0, "kept", "camera"),
            1.5,
            "state.events.0.kept.camera must be in [0, 1], got 1.5",
        ),
        (("components", "reri"), [], "components.reri must be a dictionary by name, got []"),
        (("components", "losses"), {"all": "x"}, "components.losses.all must be a number, got 'x'"),
        (
            ("components", "deci", "head.weight"),
            torch.zeros(3),
            "components and masks differ: 'deci' at ['head",
        ),
        (
            ("components",),
            {"deci": {}},
            "components must hold ['deci', 'group_of', 'losses', 'magnitude', 'reri'], got ['deci']",
        ),
        (("components", "level"), "x", "components.level must be 'weight' or 'tensor', got 'x'"),
        (("components", "group_of", "head.weight"), "camera", "components and masks differ in group_of"),
        (("rewind_point",), {}, "state.rewind_point must hold ['buffers', 'epoch',"),
        (("rewind_point",), {**POINT, "epoch": -1}, "state.rewind_point.epoch must be a whole number"),
        (
            ("rewind_point",),
            {**POINT, "buffers": {"a": 1}},
            "state.rewind_point.buffers.a must be a tensor, got 1",
        ),
        (
            ("rewind_point",),
            {**POINT, "optimizers": [3]},
            "rewind_point.optimizers.0 must be a dictionary by name, got 3",
        ),
    ],
)
def test_messages(gradual, path, damage, message):
    callback = pruner()
    callback.load_state_dict(gradual.state)
    before = callback.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        callback.load_state_dict(put(gradual.state, path, damage))
    assert_same(callback.state_dict(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "events.0.widths must be a dictionary by name, got []"),
        (
            {"widths": {"a": [1]}},
            "state.events.0.widths.a must be two whole numbers, kept and total",
        ),
        ({"widths": {"a": [3, 2]}}, "events.0.widths.a must be two whole numbers, kept and total, got"),
        ({"widths": {"a": [True, 2]}}, "must be two whole numbers, kept and total, got [True, 2]"),
        ({"widths": {"a": [0, 2]}}, "must be two whole numbers, kept and total, got [0, 2]"),
        ({"channels": 1.5}, "events.0.channels must be in [0, 1], got 1.5"),
        ({"flops": None}, "events.0.flops must be in [0, 1], got None"),
        ({"declared": []}, "events.0.declared must be a dictionary by name, got []"),
        ({"declared": {"g": 1}}, "events.0.declared.g must be a dictionary by name, got 1"),
        (
            {"declared": {"g": {"a": 1}}},
            "events.0.declared.g.a must be text, got 1",
        ),
    ],
)
def test_what_is_recorded_of_channels_is_checked(gradual, changes, message):
    state, whole = gradual.state, {"widths": {"a": [2, 4]}, "channels": 0.5, "flops": 0.5}
    state["events"][0] |= whole
    pruner().load_state_dict(state)
    state["events"][0] |= changes
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner().load_state_dict(state)


def test_unknown_parts_of_components_are_refused(gradual):
    state = gradual.state
    state["components"]["extra"] = None
    message = "components must hold ['deci', 'group_of', 'losses', 'magnitude', 'reri'], got ['deci', 'extra'"
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner().load_state_dict(state)


def test_other_groups_are_refused(gradual):
    message = (
        "'camera.0.weight' belongs to 'camera', but to 'radar' in the masks that this callback holds: go on"
    )
    state = gradual.state
    state["components"], state["group_of"]["camera.0.weight"] = None, "radar"
    with pytest.raises(ValueError, match=message):
        gradual.outcome(state)


@pytest.mark.parametrize(
    ("path", "damage", "where"),
    [
        (("optimizers", 0, "param_groups", 0, "lr"), "x", "['param_groups'][0]['lr']"),
        (("optimizers", 0, "param_groups", 0, "betas"), (0.9,), "['param_groups'][0]['betas'][1]"),
        (("optimizers", 0, "param_groups", 0, "params"), [1], "['param_groups'][0]['params'][1]"),
        (("optimizers", 0, "state"), None, ""),
        (("optimizers", 0, "state"), {99: {}}, "['state'][99]"),
        (("optimizers", 0, "state"), {0: {"exp_avg": torch.zeros(5)}}, "['state'][0]['step']"),
        (("schedulers", 0, "base_lrs"), None, "['base_lrs'][0]"),
        (("schedulers", 0, "gamma"), math.nan, "['gamma']"),
    ],
)
def test_a_rewind_point_that_would_not_load_is_refused_before_the_first_step(rewinding, path, damage, where):
    state = put(rewinding.state, ("rewind_point", *path), damage)
    message = f"cannot rewind to epoch 0: what was saved at {path[0][:-1]}{where} does not fit; resume from"
    with pytest.raises(ValueError, match=re.escape(message)):
        rewinding.outcome(state)
