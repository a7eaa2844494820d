import itertools
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from altermoma_pl.granularity.channels.finding import enliven_, find_channels
from altermoma_pl.granularity.channels.tracing import couplings_of
from tests.helpers.coupled_channels import found, untouched
from tests.helpers.coupled_models import CASES, Net, block, chain, conv, multihead
from tests.helpers.searching import OUTPUT, column, image, refused, search, slices

DIFFER = "what is left depends on how many channels there are"


@pytest.mark.parametrize("name", CASES)
def test_groups_and_their_widths(name):
    case = CASES[name]
    assert {n: group.num_channels for n, group in found(name).items()} == case.groups
    inputs = case.inputs()
    with untouched(model := case.model()):
        find_channels(model, lambda m: m(*inputs), declared=case.declared)


def test_residual_by_hand():
    stem, a = found("residual").groups
    assert slices(stem) == {
        ("stem.weight", 0): column(8), ("stem.bias", 0): column(8), ("a.weight", 1): column(8),
        ("b.weight", 0): column(8), ("b.bias", 0): column(8), ("head.weight", 1): column(8),
    }  # fmt: skip
    assert stem.producers == ("stem.weight", "b.weight")
    norm = {(f"norm.{leaf}", 0): column(6) for leaf in ("weight", "bias", "running_mean", "running_var")}
    own = {("a.weight", 0): column(6), ("a.bias", 0): column(6), ("b.weight", 1): column(6)}
    assert slices(a) == own | norm
    assert a.attributes == ()


def test_concat_by_hand():
    camera, lidar, _ = found("concat").groups
    assert slices(camera)["fuse.weight", 1] == column(8)
    assert slices(lidar)["fuse.weight", 1] == column(6, 8)


def test_depthwise_and_grouped_by_hand():
    [group] = found("depthwise").groups
    assert slices(group) == {
        ("0.weight", 0): column(8), ("0.bias", 0): column(8), ("1.weight", 0): column(8),
        ("1.bias", 0): column(8), ("3.weight", 1): column(8),
    }  # fmt: skip
    assert group.attributes == (("1", "groups"),)
    first, second = found("grouped").groups
    assert slices(first)["0.weight", 0] == [[c, 4 + c] for c in range(4)]  # one of each of two groups
    assert slices(first)["1.weight", 1] == column(4)
    assert slices(second)["1.weight", 0] == [[c, 6 + c] for c in range(6)]


def test_transposed_flattened_and_fused_by_hand():
    first, second = found("transposed").groups
    assert slices(first)["1.weight", 0] == column(8)
    assert slices(second)["1.weight", 1] == column(6)
    flat = slices(found("flatten").groups[0])["3.weight", 1]
    assert flat == [list(range(16 * c, 16 * c + 16)) for c in range(8)]
    heads = found("fused attention")["attention.qkv"]
    expected = [[16 * part + 4 * h + i for part in range(3) for i in range(4)] for h in range(4)]
    assert slices(heads)["attention.qkv.weight", 0] == expected
    assert heads.attributes == (("attention", "num_heads"),)


def test_reasons():
    assert found("residual").excluded == {"head": OUTPUT}
    normed = found("normed attention").excluded
    assert normed.keys() == {"embed", "attention.proj", "fc2", "head"}  # every producer of the stream
    attention = "nn.MultiheadAttention ties its width to the number of its heads"
    assert found("multihead").excluded == {
        "embed": attention, "fc2": attention, "head": OUTPUT, "attention.out_proj": attention
    }  # fmt: skip
    grouped = Net(
        lambda m, x: m.head(torch.relu(m.norm(m.a(torch.relu(m.stem(x)))))),
        stem=conv(3, 8), a=conv(8, 6), norm=nn.GroupNorm(1, 6), head=conv(6, 2),
    ).eval()  # fmt: skip
    channels = search(grouped)
    assert list(channels) == ["stem"]
    assert channels.excluded["a"].startswith(DIFFER)


def test_a_norm_over_channels_is_the_reason_also_beside_attention():
    """Channels by heads do not run either, which would say less."""
    channels = search(block(False, True).eval(), torch.randn(2, 5, 6))
    assert all(channels.excluded[name].startswith(DIFFER) for name in ("embed", "attention.proj", "fc2"))


def test_frozen_and_unwanted_layers():
    model = CASES["residual"].model()
    model.a.weight.requires_grad_(False)
    channels = search(model)
    assert list(channels) == ["stem"]
    assert channels.excluded == {"a": "'a.weight' is frozen", "head": OUTPUT}
    channels = search(CASES["residual"].model(), prunable=["!b.*"])
    unwanted = "'b.weight' is not prunable by the patterns"
    assert list(channels) == ["a"]
    assert channels.excluded == {"stem": unwanted, "b": unwanted, "head": OUTPUT}
    refused("no channel of Net can be removed. stem: 'b.weight' is not", model, prunable=["!b.*"])
    refused("'!absent.*'", model, prunable=["!absent.*"])


def test_computed_weights_stay():
    model = chain(parametrizations.weight_norm(conv(8, 8))).eval()
    refused("0: a weight is computed from other parameters", model)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), *chain(conv(8, 8))[1:])
    parametrizations.weight_norm(model[4])
    channels = search(model.eval())
    assert list(channels) == ["0"]
    computed = "a weight is computed from other parameters, as weight norm does"
    assert channels.excluded == {"2": computed, "4": computed, "6": OUTPUT}


class Mixed(nn.Module):
    """Adds to each channel what follows from all, times a parameter that begins as zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.scale * x.softmax(1)


def test_what_is_multiplied_by_zero_is_not_proved():
    refused("no channel of Sequential can be removed. 0: " + DIFFER, chain(Mixed()).eval())


def test_nothing_is_proved_behind_a_head_of_zeros():
    model = chain(nn.Softmax(1)).eval()
    nn.init.zeros_(model[3].weight)
    refused("0: " + DIFFER, model)


def test_the_trial_catches_what_the_graph_reads_wrongly():
    """The first layer's channels are sorted: element-wise for the graph, and any may be any."""

    def function(m, x):
        x = torch.relu(m.stem(x))
        return m.head(torch.relu(m.a(x.sort(1).values)))

    model = Net(function, stem=conv(3, 8), a=conv(8, 6), head=conv(6, 2)).eval()
    [coupling, *_] = couplings_of(model, lambda m: m(image()))
    assert [(p.module, p.side) for p in coupling.ports] == [(model.stem, "out"), (model.a, "in")]
    channels = search(model)
    assert list(channels) == ["a"]
    assert channels.excluded["stem"].startswith(DIFFER)


class Boxes(dict):
    """What detectors return: a dictionary of their own."""


def test_outputs_in_subclasses_of_dictionaries_are_followed():
    class Detector(nn.Sequential):
        def forward(self, x):
            return [Boxes(scores=super().forward(x), labels=None)]

    assert search(Detector(*chain(nn.ReLU())).eval()).keys() == {"0"}


class Refuses(nn.Module):
    def forward(self, x):
        if x.shape[1] != 8:
            raise KeyError("eight")
        return x


def test_any_exception_of_the_smaller_model_is_a_reason():
    model = nn.Sequential(conv(3, 8), Refuses(), conv(8, 6), nn.ReLU(), conv(6, 2)).eval()
    assert search(model).excluded["0"] == "the smaller model does not run: 'eight'"


def test_models_that_cannot_be_searched():
    refused("Sequential does not run on the example inputs", chain(conv(8, 8)), torch.ones(1, 1))
    refused("Net returns no floating-point tensor", Net(lambda m, x: m.a(x) > 0, a=conv(3, 2)))
    turn = itertools.count(1)
    refused("gives another output each time", Net(lambda m, x: m.a(x) * next(turn), a=conv(3, 2)))
    refused("or one that is not finite", Net(lambda m, x: m.a(x) / 0, a=conv(3, 2)))
    refused("nothing is prunable", nn.Sequential(nn.ReLU()))
    cut = Net(lambda m, x: m.head(m.a(x)).detach(), a=conv(3, 8), head=conv(8, 2))
    refused(
        "the channels of Net cannot be followed: nothing that Net returns depends on its parameters .*; "
        "declare groups by hand",
        cut,
    )
    refused("no channel of Conv2d can be removed. : its channels are an output", conv(3, 8))


def test_groups_that_go_only_alone(monkeypatch):
    """Where any two are refused though each was proved."""
    from altermoma_pl.granularity.channels.finding import _Search

    real = _Search.why_not
    monkeypatch.setattr(
        _Search, "why_not", lambda search, groups: "two" if len(groups) > 1 else real(search, groups)
    )
    refused("one group at a time, but not together: two; leave layers out", CASES["residual"].model())


def test_random_models_draw_the_same_each_time():
    noisy = Net(lambda m, x: m.head(torch.relu(m.a(x + torch.rand_like(x)))), a=conv(3, 8), head=conv(8, 2))
    assert list(search(noisy)) == ["a"]
    # Where what is drawn depends on the number of channels, nothing can be compared.
    refused("0: " + DIFFER, nn.Sequential(conv(3, 8), nn.ReLU(), nn.Dropout2d(0.5), conv(8, 2)))


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    message = r"removing channels needs torch-pruning: pip install 'altermoma-pl\[structured\]'"
    refused(message, CASES["residual"].model(), kind=ModuleNotFoundError)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(multihead().eval(), torch.randn(2, 5, 6))
        search(block(True, True).eval(), torch.randn(2, 5, 6))


class Crossed(nn.Module):
    """Two layers of one weight that read the same channels in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.one, self.two = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.two.weight = self.one.weight
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        a, b = torch.relu(self.a(x)), torch.tanh(self.b(x))
        return self.head(torch.relu(self.one(torch.cat([a, b], 1)) + self.two(torch.cat([b, a], 1))))


def test_a_weight_that_is_read_in_two_orders():
    channels = search(Crossed().eval())
    reason = "'one.weight' is used in two places that order its channels differently"
    assert list(channels) == ["one"]
    assert (channels.excluded["a"], channels.excluded["b"]) == (reason, reason)


def test_meanwhile_no_learned_parameter_is_zero():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    model.ones = nn.Parameter(torch.ones(4))
    model.number = nn.Parameter(torch.zeros(()))
    model.none = nn.Parameter(torch.ones(0))
    model.grid = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.index = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    enliven_(model, torch.Generator().manual_seed(0))
    assert ((model.weight != before["weight"]) == (before["weight"] == 0)).all()
    assert model.ones.unique().numel() == 4
    assert (model.ones - 1).abs().max() < 0.5
    assert model.number != 0
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in ("none", "grid", "index"))


def test_running_variances_of_dead_channels_are_raised():
    norms = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    norms[0].running_var.copy_(torch.tensor([4.0, 0.5, 1e-12]))
    norms[1].running_var.zero_()
    enliven_(norms, torch.Generator().manual_seed(0))
    assert norms[0].running_var.tolist() == [4.0, 0.5, 4.0]
    assert norms[1].running_var.tolist() == [1.0, 1.0]


def test_channels_that_have_long_been_pruned_are_found_again():
    torch.manual_seed(0)
    layers = [
        layer for _ in range(6) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    ]
    model = nn.Sequential(nn.Conv2d(3, 64, 1), *layers, nn.Conv2d(64, 1, 1)).eval()
    inputs = torch.randn(2, 3, 8, 8)

    def forward(module):
        return module(inputs).sin()  # of large numbers, rounding decides

    channels = find_channels(model, forward)
    kept = {group.name: torch.arange(64) < 8 for group in channels.values()}
    channels.to_masks(kept, dict(model.named_parameters())).apply_(model)
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var[8:] = 0  # the variance of zeros
            norm.eps = 1e-8
    assert find_channels(model, forward).keys() == channels.keys()
