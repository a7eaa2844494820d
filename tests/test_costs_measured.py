"""What models cost: counts by hand, turns by a recording model, and models left as they were."""

import gzip
import io
import re

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import grid_sample, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from altermoma_pl.costs import count_flops, measure, peak_memory
from altermoma_pl.costs.measuring import quartiles
from altermoma_pl.costs.timing import in_turns
from tests.models import snapshot

CPU = torch.device("cpu")
ROW = torch.ones(1, 4)


class TwoInputs(nn.Module):
    """camera (1, 2, 4, 4) and lidar (1, 3) -> (1, 5)."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Conv2d(2, 4, kernel_size=3)
        self.norm = nn.BatchNorm2d(4)
        self.lidar = nn.Linear(3, 6)
        self.head = nn.Linear(22, 5)

    def forward(self, camera, lidar):
        seen = self.norm(self.camera(camera)).flatten(1)
        return self.head(torch.cat([seen, self.lidar(lidar).relu()], 1)) @ torch.eye(5)


TWO = (torch.ones(1, 2, 4, 4), torch.ones(1, 3))


class Attention(nn.Module):
    def forward(self, query):
        return scaled_dot_product_attention(query, query, query)


class Warp(nn.Module):
    """Reads features at places, and adds them up in cells."""

    def forward(self, features):
        places = torch.zeros(1, 1, 2, 2)
        cells = grid_sample(features, places, align_corners=False).flatten()
        return torch.zeros(3).index_add(0, torch.zeros(len(cells), dtype=torch.long), cells)


class Extension(nn.Module):
    """Has weights, but torch sees nothing of what it does with them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return x


class Own(nn.Module):
    """Turns on inference mode itself, in which operators are not divided."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        with torch.inference_mode():
            return self.layer(x)


class Recorder(nn.Module):
    """Says who ran, with what, and in which mode."""

    def __init__(self, name, record):
        super().__init__()
        self.name, self.record = name, record  # not a list, which would be emptied again

    def forward(self, x):
        mode = (torch.is_inference_mode_enabled(), self.training, torch.get_num_threads())
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


def test_flops_of_a_convolution():
    """2 x (3 channels x 3 x 3 kernel) for each of 8 channels at 4 x 4 places."""
    flops = count_flops(nn.Conv2d(3, 8, 3), (torch.ones(1, 3, 6, 6),))
    assert (flops.total, flops.of_module, flops.uncounted) == (2 * 27 * 8 * 16, {"": 2 * 27 * 8 * 16}, ())


def test_flops_of_two_inputs_by_module():
    flops = count_flops(TwoInputs(), TWO)
    assert flops.of_module == {
        "camera": 2 * 18 * 4 * 4,  # 2 x 3 x 3 inputs for each of 4 channels at 2 x 2 places
        "lidar": 2 * 3 * 6,
        "head": 2 * 22 * 5,
        "": 2 * 5 * 5,  # what the model does itself
    }
    assert flops.total == 576 + 36 + 220 + 50
    assert flops.uncounted == ("native_batch_norm_legit_no_training in BatchNorm2d",)
    with FlopCounterMode(display=False) as reference:
        TwoInputs().eval()(*TWO)
    assert reference.get_total_flops() == flops.total


def test_flops_on_the_meta_device():
    inputs = tuple(each.to("meta") for each in TWO)
    assert count_flops(TwoInputs().to("meta"), inputs) == count_flops(TwoInputs(), TWO)


def test_flops_of_attention():
    """Two products of 8 x 4 with 4 x 8 numbers; the softmax between them is not counted."""
    flops = count_flops(Attention(), (torch.ones(1, 1, 8, 4),))
    assert flops.total == 2 * (2 * 8 * 8 * 4)
    assert [what.split(" in ")[1] for what in flops.uncounted] == ["Attention"]


def test_flops_of_an_encoder_layer_that_would_be_fused():
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=16, batch_first=True)
    flops = count_flops(layer, (torch.ones(1, 8, 4),))
    assert flops.of_module["linear1"] == 2 * 8 * 4 * 16
    with FlopCounterMode(display=False) as reference, sdpa_kernel(SDPBackend.MATH):
        layer(torch.ones(1, 8, 4))  # in training, which is never fused
    assert flops.total == reference.get_total_flops()
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_in_inference_mode():
    assert count_flops(Own(), (ROW,)).of_module == {"layer": 2 * 4 * 2}


def test_what_cannot_be_counted():
    flops = count_flops(Warp(), (torch.ones(1, 1, 2, 2),))
    assert flops.total is None
    assert flops.uncounted == ("grid_sampler_2d in Warp", "index_add in Warp")
    assert count_flops(nn.ReLU(), (ROW,)).total == 0


def test_a_module_whose_work_is_not_seen():
    net = nn.Sequential(nn.Linear(4, 2), Extension())
    assert count_flops(net, (ROW,)).uncounted == ("Extension",)
    assert count_flops(net[0], (ROW,)).uncounted == ()


@pytest.mark.parametrize(
    ("net", "num_floats"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 8 + 2),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 8 + 8),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), 8 + 2),
        (nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3)), 8 + 6),  # a view is free
        (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 7), nn.Linear(7, 1)), 2 + 7),  # the 2 are let go
        (nn.Identity(), 0),
    ],
)
def test_peak_memory(net, num_floats):
    assert peak_memory(net, (ROW,), CPU) == 4 * num_floats


def test_peak_memory_in_an_encoder_layer_that_would_be_fused():
    """Between its linear layers are 8 x 64 numbers, before and after the ReLU, beside 8 x 4 of the norm."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=64, batch_first=True)
    assert peak_memory(layer, (torch.ones(1, 8, 4),), CPU) >= 4 * (2 * 8 * 64 + 8 * 4)


def test_peak_memory_of_another_device():
    assert peak_memory(nn.ReLU(), (ROW.to("meta"),), torch.device("meta")) is None


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
    report = measure({"net": net}, {2: (ROW.expand(2, 4),), 1: (ROW,)}, repeats=3, warm_up=0)
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
        (2, 3, 0, "cpu"),
        (1, 3, 0, "cpu"),
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
    measure(models, inputs, repeats=3, warm_up=2, threads=1)
    timed = [call for call in log if call[2]]
    for batch in inputs:
        assert "".join(name for name, size, *_ in timed if size == batch) == "abcabc" + "abccbaabc"
    assert {(training, threads) for *_, training, threads in log} == {(False, 1)}
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
    models, threads = {"a": model, "b": Moody()}, torch.get_num_threads()
    before = [snapshot(each) for each in models.values()]
    report = measure(models, {1: (ROW,)}, repeats=1, threads=threads + 1)
    assert report.costs["a"].latency[0].threads == threads + 1
    assert torch.get_num_threads() == threads
    assert [snapshot(each) for each in models.values()] == before
    assert (model.calls, model.seen) == (0, [])


def test_counting_leaves_flags_random_numbers_and_hooks():
    model = Moody().train()
    model.frozen.eval()
    random = torch.get_rng_state()
    count_flops(model, (ROW,))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failure_restores_too():
    model = Moody().train()
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="refuses"):
        measure({"a": model}, {1: (torch.ones(1, 3),)}, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert model.training
    with pytest.raises(RuntimeError):
        count_flops(model, (torch.ones(1, 3),))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


NET = {"net": nn.Linear(4, 2)}
GOOD = {1: (ROW,)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": {}}, "no model to measure: give at least one, by name"),
        ({"inputs": {}}, "no inputs: give at least one batch size"),
        ({"inputs": {0: (ROW,)}}, "a batch size must be at least 1, got 0"),
        ({"inputs": {1: ROW}}, "inputs of batch size 1 must be a tuple of arguments, got Tensor"),
        (
            {"inputs": {1: (ROW,), 3: (torch.ones(3, 5),)}},
            "model 'net' refuses the inputs of batch size 3: RuntimeError: mat1 and mat2",
        ),
        ({"inputs": {1: (ROW, ROW)}}, "model 'net' refuses the inputs of batch size 1: TypeError: "),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warm_up": -1}, "warm_up must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
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
