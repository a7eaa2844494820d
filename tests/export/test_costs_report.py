"""The report on costs: each of its forms, and what is no report."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altermoma_pl.export.costs.report import CostReport, Costs, Latency

FAST = Latency(1, 0.002, 0.001, 0.003, repeats=20, warm_up=3, threads=2, device="cpu")
DENSE = Costs(
    num_parameters=2000,
    num_nonzero=1000,
    flops=4_000_000,
    uncounted=("softmax in Head",),
    peak_memory=500,
    latency=(FAST, replace(FAST, batch=8, high=0.004)),
    file_bytes=8000,
    compressed_bytes=4000,
    metrics={"mIoU [%]": 50.0},
)
SLIM = replace(
    DENSE,
    num_parameters=1000,
    flops=None,
    uncounted=("lstm in LSTM",),
    peak_memory=None,
    latency=(replace(FAST, median=0.001),),
    metrics={"AP": 0.25},
)
REPORT = CostReport(1, {"dense": DENSE, "slim": SLIM})


def lines(report):
    table = report.to_text(width=150).split("└")[0]
    return [" ".join(line.replace("│", " ").split()) for line in table.splitlines()]


def test_table():
    header, *rows = [line for line in lines(REPORT) if not set(line) & set("┏┡└")][1:]
    assert header == "┃ ┃ dense ┃ slim ┃ / dense ┃"
    assert rows == [
        "parameters 2,000 1,000 0.500",
        "not zero 1,000 1,000 1.000",
        "FLOPs 4 M - -",
        "peak memory 500 B - -",
        "latency, batch 1 2.000 ms [1.000, 3.000] 1.000 ms [1.000, 3.000] 0.500",
        "latency, batch 8 2.000 ms [1.000, 4.000] - -",
        "file 8 kB 8 kB 1.000",
        "file, compressed 4 kB 4 kB 1.000",
        "mIoU [%] 50 - -",
        "AP - 0.25 -",
    ]


def test_a_metric_that_is_not_finite_is_missing():
    report = CostReport(1, {"a": replace(DENSE, metrics={"AP": math.nan}), "b": DENSE})
    assert "AP - - -" in lines(report)
    assert json.loads(report.to_json())["costs"]["a"]["metrics"] == {"AP": None}
    assert next(csv.DictReader(io.StringIO(report.to_csv())))["metrics.AP"] == ""
    assert math.isnan(CostReport.from_json(report.to_json()).costs["a"].metrics["AP"])


def test_a_ratio_to_nothing_is_a_dash():
    report = CostReport(
        1, {"a": replace(DENSE, metrics={"AP": 0.0}), "b": replace(DENSE, metrics={"AP": 1.0})}
    )
    assert "AP 0 1 -" in lines(report)


@pytest.mark.parametrize(
    ("flops", "text"), [(0, "0"), (999, "999"), (999_960, "1 M"), (7_172_000, "7.172 M"), (3e15, "3000 T")]
)
def test_units(flops, text):
    assert f"FLOPs {text}" in lines(CostReport(1, {"a": replace(DENSE, flops=int(flops))}))


def test_a_metric_may_be_called_as_another_row():
    report = CostReport(1, {"a": replace(DENSE, metrics={"FLOPs": 0.5, "metrics.file": 1.0})})
    assert {"FLOPs 4 M", "FLOPs 0.5", "file 8 kB", "metrics.file 1"} <= set(lines(report))


def test_names_are_no_markup():
    assert "[bold]" in CostReport(1, {"[bold]": DENSE}).to_text(width=150)


def test_notes():
    zeros, flops, memory, latency, file = REPORT.notes
    assert "Zeros in dense tensors save no time" in zeros
    assert "compressed file smaller" in zeros
    assert flops.endswith("nor is the work of softmax in Head, lstm in LSTM.")
    assert memory.endswith("beyond weights and inputs, batch 1, without scratch memory inside an operator.")
    assert latency.startswith(
        "Latency: median of 20 runs after 3 to warm up, quartiles in brackets, 2 threads of torch, on cpu"
    )
    assert "gzip, level 6" in file
    text = " ".join(REPORT.to_text(width=150).split())
    assert all(note in text for note in REPORT.notes)


def test_notes_of_a_gpu_and_of_all_counted():
    there = replace(DENSE, uncounted=(), latency=(replace(FAST, threads=1, device="cuda:0"),))
    _, flops, memory, latency, _ = CostReport(4, {"a": there}).notes
    assert flops.endswith("batch 4; element-wise operators are not counted.")
    assert memory.endswith("with what kernels need inside.")
    assert "1 thread of torch, on cuda:0" in latency


def test_csv():
    dense, slim = csv.DictReader(io.StringIO(REPORT.to_csv()))
    assert (dense["model"], dense["flops"], dense["latency.8.high"]) == ("dense", "4000000", "0.004")
    assert (slim["num_parameters"], slim["flops"], slim["latency.8.high"]) == ("1000", "", "")
    assert (dense["metrics.mIoU [%]"], slim["metrics.mIoU [%]"], slim["metrics.AP"]) == ("50.0", "", "0.25")


COUNTS = st.integers(0, 2**62)
SECONDS = st.floats(0, 1e6)
LATENCIES = st.builds(
    lambda batch, seconds, **rest: Latency(batch, seconds[1], seconds[0], seconds[2], **rest),
    st.integers(1, 1024),
    st.lists(SECONDS, min_size=3, max_size=3).map(sorted),
    repeats=st.integers(1, 99),
    warm_up=st.integers(0, 9),
    threads=st.integers(1, 64),
    device=st.text(),
)
COSTS = st.builds(
    Costs,
    num_parameters=COUNTS,
    num_nonzero=COUNTS,
    flops=st.none() | COUNTS,
    uncounted=st.lists(st.text()).map(tuple),
    peak_memory=st.none() | COUNTS,
    latency=st.lists(LATENCIES, max_size=2).map(tuple),
    file_bytes=COUNTS,
    compressed_bytes=COUNTS,
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)
REPORTS = st.builds(
    CostReport, st.integers(1, 1024), st.dictionaries(st.text(), COSTS, min_size=1, max_size=3)
)


@settings(max_examples=50, deadline=None)
@given(REPORTS)
def test_json_round_trip(report):
    found = CostReport.from_json(report.to_json())
    assert found == report
    assert list(found.costs) == list(report.costs)
    assert found.to_json() == report.to_json()


@settings(max_examples=50, deadline=None)
@given(REPORTS)
def test_every_report_can_be_shown(report):
    assert report.to_text(width=150)
    assert report.to_csv().startswith("model,num_parameters,")


def damaged(*path, value):
    """The text of the report with one entry changed, or left out where `value` is `...`."""
    content = json.loads(REPORT.to_json())
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    if value is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        (REPORT.to_json()[:-9], "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'batch'"),
        (damaged("costs", value={}), "a cost report needs at least one model"),
        (damaged("costs", value=[]), "AttributeError"),
        (damaged("costs", "slim", "flops", value=...), "missing 1 required"),
        (damaged("costs", "slim", "colour", value=1), "unexpected keyword argument 'colour'"),
        (damaged("costs", "slim", "uncounted", value=1), "'int' object is not iterable"),
        (damaged("costs", "slim", "latency", 0, "repeats", value=...), "missing 1 required"),
    ],
)
def test_what_is_no_report(text, message):
    with pytest.raises(ValueError, match=f"this is no cost report.*{re.escape(message)}"):
        CostReport.from_json(text)


def test_a_report_on_nothing():
    with pytest.raises(ValueError, match="a cost report needs at least one model"):
        CostReport(1, {})
