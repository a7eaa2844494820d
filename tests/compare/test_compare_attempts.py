"""What is told of a long comparison, in a log file and on a terminal; tasks in this process."""

import io
import logging
import sys
import warnings

import pytest

from altermoma_pl.compare import attempts as module
from altermoma_pl.compare.attempts import Failure, attempt, follow


class Clock:
    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        self.now += self.step
        return self.now


def told(monkeypatch, step, num=10, failing=()):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "time", Clock(step))
    attempts = [(f"c{i}", Failure("Oh()", "") if i in failing else None) for i in range(num)]
    failures = follow("cells", attempts, 5, 5 + num)
    return stream.getvalue().splitlines(), failures


def test_time_left(monkeypatch):
    lines, _ = told(monkeypatch, step=15, num=6)
    assert lines[1] == "cells: 7 of 11 are done, 0:01:00 left"
    lines, _ = told(monkeypatch, step=3600, num=25)
    assert lines[1] == "cells: 6 of 30 are done, 1 day, 0:00:00 left"


def test_a_log_has_a_line_for_each_slow_task(monkeypatch):
    lines, _ = told(monkeypatch, step=60, num=3)
    assert lines == [
        "cells: 5 of 8 are done",
        "cells: 6 of 8 are done, 0:02:00 left",
        "cells: 7 of 8 are done, 0:01:00 left",
        "cells: 8 of 8 are done, 0:00:00 left",
    ]


def test_a_log_is_not_flooded_by_fast_tasks(monkeypatch):
    lines, _ = told(monkeypatch, step=0.1, num=1000)
    assert len(lines) == 1 + 3 + 1


def test_failures_are_told_at_once(monkeypatch):
    lines, failures = told(monkeypatch, step=0.1, failing=[3])
    assert lines[1] == "failed: c3: Oh()"
    assert failures == {"c3": Failure("Oh()", "")}


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines, _ = told(monkeypatch, step=60, num=3)
    shown = "".join(lines)
    assert "8/8" in shown
    assert "0:00:00 left" in shown
    assert not any("are done" in line for line in lines)


def chatter():
    print("chatter")  # noqa: T201
    warnings.warn("chatter", stacklevel=1)
    logging.getLogger("lightning.pytorch").warning("chatter")


def test_tasks_are_quiet_and_only_they(capsys, caplog):
    assert list(attempt({"a": chatter}, 1, 1)) == [("a", None)]
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []
    logging.getLogger("altermoma").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_an_interrupt_is_no_failure():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(attempt({"a": interrupted}, 1, 1))
