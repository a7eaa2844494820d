"""Measuring models: by hand, turns by a recording model, and models left as they were."""

import gzip
import io
import re

import pytest
import torch
from torch import nn

from altermoma_pl.export import example_tensors, to_onnx
from altermoma_pl.export.costs.measuring import in_turns, measure, peak_memory, quartiles, time_onnx
from tests.helpers.models import snapshot

ROW = torch.ones(1, 4)


class Recorder(nn.Module):
    """Says who ran, with what, and in which mode."""

    def __init__(self, name, record):
        super().__init__()
        self.name, self.record = name, record  # not a list, which would be emptied again

    def forward(self, x):
        mode = (torch.is_inference_mode_enabled(), self.training)
        self.record((self.name, len(x), *mode))
        return x


class Moody(nn.Module):
    """Changes all it can: counts calls, draws numbers, writes a buffer."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.seen = []
        self.frozen = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.state += 1
        return self.layer(self.frozen(x)) + torch.rand(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu():
    cuda = torch.device("cuda")
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).to(cuda)
    inputs = (torch.ones(1, 2**20, device=cuda),)
    assert peak_memory(model, inputs, cuda) == 2 * 4 * 2**20
    layer = nn.Linear(4, 2).to(cuda)
    (latency,) = measure({"a": layer}, {1: (ROW.to(cuda),)}, repeats=2).costs["a"].latency
    assert latency.device.startswith("cuda")
    assert latency.median > 0


def test_measured_by_hand():
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.zero_()[0, 0] = 1
        net.bias.fill_(1)
    report = measure({"net": net}, {2: (ROW.expand(2, 4),), 1: (ROW,)}, repeats=3)
    costs = report.costs["net"]
    assert report.batch == 1
    assert (costs.num_parameters, costs.num_nonzero) == (10, 3)
    assert (costs.flops, costs.uncounted, costs.peak_memory) == (16, (), 8)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert costs.file_bytes == len(file.getvalue())
    assert costs.compressed_bytes == len(gzip.compress(file.getvalue(), 6))
    assert costs.metrics == {}
    assert [(own.batch, own.repeats, own.warm_up, own.device) for own in costs.latency] == [
        (2, 3, 3, "cpu"),
        (1, 3, 3, "cpu"),
    ]
    assert all(0 < own.low <= own.median <= own.high for own in costs.latency)


def test_metrics_are_those_given():
    nets = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
    report = measure(nets, {1: (ROW,)}, repeats=1, metrics={"b": {"AP": 0.5}})
    assert [dict(costs.metrics) for costs in report.costs.values()] == [{}, {"AP": 0.5}]


def test_models_take_turns():
    log = []
    models = {name: Recorder(name, log.append) for name in "abc"}
    inputs = {1: (torch.ones(1),), 2: (torch.ones(2),)}
    measure(models, inputs, repeats=3)
    timed = [call for call in log if call[2]]
    for batch in inputs:
        assert "".join(name for name, size, *_ in timed if size == batch) == "abcabcabc" + "abccbaabc"
    assert {training for *_, training in log} == {False}
    trials = [(name, size) for name, size, *_ in log[:6]]
    assert trials == [(name, size) for name in "abc" for size in inputs]


def test_turns_are_warmed_up():
    order = []
    taken = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warm_up=2)
    assert "".join(order) == "abababba"
    assert {name: len(values) for name, values in taken.items()} == {"a": 2, "b": 2}


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2, 3, 4)
    assert quartiles([0.0, 1.0]) == (0.25, 0.5, 0.75)
    assert quartiles([7.0]) == (7, 7, 7)
    value = 0.007036762000097951
    assert quartiles([value] * 7) == (value, value, value)


def test_all_is_left_as_it_was():
    model = Moody().train()
    model.frozen.eval()
    model.layer(ROW).sum().backward()
    models = {"a": model, "b": Moody()}
    before = [snapshot(each) for each in models.values()]
    report = measure(models, {1: (ROW,)}, repeats=1)
    assert report.costs["a"].latency[0].threads == torch.get_num_threads()
    assert [snapshot(each) for each in models.values()] == before
    assert (model.calls, model.seen) == (0, [])


def test_a_failure_restores_too():
    model = Moody().train()
    with pytest.raises(ValueError, match="refuses"):
        measure({"a": model}, {1: (torch.ones(1, 3),)})
    assert model.training
    with pytest.raises(RuntimeError):
        peak_memory(model, (torch.ones(1, 3),), torch.device("cpu"))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


NET = {"net": nn.Linear(4, 2)}
GOOD = {1: (ROW,)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": {}}, "no model to measure: give at least one, by name"),
        ({"inputs": {}}, "no inputs: give at least one batch size"),
        ({"inputs": {1: ROW}}, "inputs of batch size 1 must be a tuple of arguments, got Tensor"),
        (
            {"inputs": {1: (ROW,), 3: (torch.ones(3, 5),)}},
            "model 'net' refuses the inputs of batch size 3: RuntimeError: mat1 and mat2",
        ),
        ({"inputs": {1: (ROW, ROW)}}, "model 'net' refuses the inputs of batch size 1: TypeError: "),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"metrics": {"ner": {"AP": 1.0}}}, "metrics of unknown models ['ner']; there are ['net']"),
        (
            {"models": {**NET, "far": nn.Linear(4, 2, device="meta")}},
            "models must be on one device to be compared, got cpu, meta",
        ),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(**{"models": NET, "inputs": GOOD, **given})


def test_onnx_files_are_timed_in_rounds(tmp_path):
    models = {"wide": nn.Linear(4, 64), "slim": nn.Linear(4, 8)}
    images = torch.zeros(2, 4)
    files = {name: to_onnx(model, (images,), tmp_path / name) for name, model in models.items()}
    tensors = example_tensors(models["wide"], (images,)) | {"unused": torch.zeros(1)}
    taken = time_onnx(files, tensors, repeats=4)
    assert {name: len(times) for name, times in taken.items()} == {"wide": 6, "slim": 6}
    assert min(taken["wide"] + taken["slim"]) > 0
