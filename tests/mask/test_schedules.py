import dataclasses
import inspect
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from altermoma_pl import Cubic, Exponential, Linear, OneShot, Rewinding, Schedule
from altermoma_pl.mask import schedules as module
from tests.helpers.models import concrete_subclasses

SCHEDULES = concrete_subclasses(Schedule)
GRADUAL = [Linear, Cubic, Exponential]


def test_the_shipped_ones_are_found():
    assert {OneShot, Linear, Cubic, Exponential, Rewinding} <= set(SCHEDULES)


def table(schedule, target, epochs):
    return [schedule.sparsity_at(epoch, target) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("schedule", "target", "expected"),
    [
        (OneShot(), 0.9, [0.9, 0.9, 0.9]),
        (OneShot(2), 0.9, [0, 0, 0.9, 0.9]),
        (Linear(0, 4), 0.5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]),
        (Linear(1, 4, every=2), 0.9, [0, 0.3, 0.3, 0.6, 0.9, 0.9]),  # events at 1, 3 and 4
        (Linear(1, 5, every=2), 0.9, [0, 0.3, 0.3, 0.6, 0.6, 0.9]),  # events at 1, 3 and 5
        (Linear(2, 2), 0.5, [0, 0, 0.5, 0.5]),
        (Linear(0, 2, every=9), 0.5, [0.25, 0.25, 0.5]),  # events at 0 and 2
        (Cubic(0, 1), 0.8, [0.7, 0.8]),  # 0.8 * (1 - 1/8)
        (Cubic(0, 3), 0.64, [0.37, 0.56, 0.63, 0.64]),  # 0.64 * (1 - (27, 8, 1, 0) / 64)
        (Exponential(0, 1), 0.75, [0.5, 0.75]),  # a half, twice
        (Exponential(0, 2), 0.875, [0.5, 0.75, 0.875]),
        (Rewinding(3, 1), 0.875, [0.5, 0.75, 0.875, 0.875]),
        (Rewinding(3, 2, rewind_epoch=1), 0.875, [0, 0.5, 0.5, 0.75, 0.75, 0.875]),
        (Rewinding(1, 4), 0.9, [0.9, 0.9]),
    ],
)
def test_by_hand(schedule, target, expected):
    assert table(schedule, target, len(expected)) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "events"),
    [
        (OneShot(), [0]),
        (OneShot(3), [3]),
        (Linear(1, 4, every=2), [1, 3, 4]),
        (Cubic(1, 5, every=2), [1, 3, 5]),
        (Exponential(2, 2), [2]),
        (Cubic(), [0, 1, 2, 3, 4]),
        (Rewinding(), [0, 4, 8]),
        (Rewinding(2, 3, rewind_epoch=1), [1, 4]),
        (Rewinding(1, 4, rewind_epoch=2), [2]),
    ],
)
def test_events_by_hand(schedule, events):
    assert [epoch for epoch in range(10) if schedule.is_due(epoch)] == events
    assert schedule.last_epoch == events[-1]


@st.composite
def schedules(draw):
    cls = draw(st.sampled_from(SCHEDULES))
    if cls is OneShot:
        return OneShot(draw(st.integers(0, 20)))
    if cls is Rewinding:
        return Rewinding(draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 10)))
    start = draw(st.integers(0, 10))
    return cls(start, draw(st.integers(start, start + 12)), draw(st.integers(1, 15)))


@given(schedules(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_contract(schedule, per_cent):
    target = per_cent / 100
    due = [schedule.is_due(epoch) for epoch in range(40)]
    values = table(schedule, target, 40)
    assert due[schedule.last_epoch]
    assert not any(due[schedule.last_epoch + 1 :])
    assert values[: due.index(True)] == [0.0] * due.index(True)
    assert set(values[schedule.last_epoch :]) == {target}  # exactly
    assert values == sorted(values)
    assert all(0 <= value <= target for value in values)
    steps = [epoch for epoch in range(1, 40) if values[epoch] != values[epoch - 1]]
    assert all(due[epoch] for epoch in steps)
    if target > 0:
        assert all(values[epoch] > 0 for epoch in range(40) if due[epoch])


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_only_rewinding_rewinds_and_not_past_its_first_event(schedule):
    events = [epoch for epoch in range(40) if schedule.is_due(epoch)]
    assert schedule.rewinds_to == (events[0] if isinstance(schedule, Rewinding) else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "Rewinding: rounds must be at least 1, got 0"),
        ((1, 0), "Rewinding: epochs_per_round must be at least 1, got 0"),
        ((1, 1, -1), "Rewinding: rewind_epoch must be at least 0, got -1"),
    ],
)
def test_impossible_rounds_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rewinding(*arguments)


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_each_event_prunes_more(schedule):
    values = table(schedule, 0.9, 40)
    events = [epoch for epoch in range(40) if schedule.is_due(epoch)]
    pruned = [values[epoch] for epoch in events]
    assert len(set(pruned)) == len(pruned)


@pytest.mark.parametrize("cls", SCHEDULES)
def test_frozen_comparable_and_documented(cls):
    schedule = cls()
    assert schedule == cls()
    assert hash(schedule) == hash(cls())
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 1)
    assert inspect.getdoc(cls)
    assert cls.__name__ in vars(module)


def test_one_shot_before_training_is_an_error():
    with pytest.raises(ValueError, match=re.escape("OneShot: epoch must be at least 0, got -1")):
        OneShot(-1)


@pytest.mark.parametrize("cls", GRADUAL)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2), ": 0 <= start <= end is needed, got start=-1, end=2"),
        ((3, 2), ": 0 <= start <= end is needed, got start=3, end=2"),
        ((0, 2, 0), ": every must be at least 1, got 0"),
    ],
)
def test_impossible_events_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=re.escape(cls.__name__ + message)):
        cls(*arguments)
