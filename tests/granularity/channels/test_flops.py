"""FLOPs of a pass by hand, what is not counted, and FLOPs by the widths of groups."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import grid_sample, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from altermoma_pl.granularity.channels.finding import find_channels
from altermoma_pl.granularity.channels.flops import FlopModel, count_flops
from altermoma_pl.granularity.channels.slimming import slim
from tests.helpers.coupled_channels import found, random_kept
from tests.helpers.coupled_models import CASES

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


class Moody(nn.Module):
    """Draws numbers."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.frozen(x)) + torch.rand(1)


class Branching(nn.Module):
    """Hides its work in an operator of operators."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.cond(x.sum() > 0, self.layer, torch.relu, (x,)))


class Stepping(nn.Module):
    """Has no `forward`, as a LightningModule of which only `training_step` runs; makes a layer meanwhile."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def training_step(self, x):
        return nn.Linear(2, 3)(self.two(self.one(x)))


def counted(model, inputs):
    return count_flops(model.eval(), lambda each: each(*inputs))


def test_flops_of_a_convolution():
    """2 x (3 channels x 3 x 3 kernel) for each of 8 channels at 4 x 4 places."""
    flops = counted(nn.Conv2d(3, 8, 3), (torch.ones(1, 3, 6, 6),))
    assert (flops.total, flops.of_module, flops.uncounted) == (2 * 27 * 8 * 16, {"": 2 * 27 * 8 * 16}, ())


def test_flops_of_two_inputs_by_module():
    flops = counted(TwoInputs(), TWO)
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
    assert counted(TwoInputs().to("meta"), inputs) == counted(TwoInputs(), TWO)


def test_flops_of_attention():
    """Two products of 8 x 4 with 4 x 8 numbers; the softmax between them is not counted."""
    flops = counted(Attention(), (torch.ones(1, 1, 8, 4),))
    assert flops.total == 2 * (2 * 8 * 8 * 4)
    assert [what.split(" in ")[1] for what in flops.uncounted] == ["Attention"]


def test_flops_of_an_encoder_layer_that_would_be_fused():
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=16, batch_first=True)
    flops = counted(layer, (torch.ones(1, 8, 4),))
    assert flops.of_module["linear1"] == 2 * 8 * 4 * 16
    with FlopCounterMode(display=False) as reference, sdpa_kernel(SDPBackend.MATH):
        layer(torch.ones(1, 8, 4))  # in training, which is never fused
    assert flops.total == reference.get_total_flops()
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_in_inference_mode():
    assert counted(Own(), (ROW,)).of_module == {"layer": 2 * 4 * 2}


def test_what_cannot_be_counted():
    flops = counted(Warp(), (torch.ones(1, 1, 2, 2),))
    assert flops.total is None
    assert flops.uncounted == ("grid_sampler_2d in Warp", "index_add in Warp")
    assert counted(nn.ReLU(), (ROW,)).total == 0


def test_a_module_whose_work_is_not_seen():
    net = nn.Sequential(nn.Linear(4, 2), Extension())
    assert counted(net, (ROW,)).uncounted == ("Extension",)
    assert counted(net[0], (ROW,)).uncounted == ()


def test_flops_where_not_forward_runs():
    """Layers have their own paths also where the model itself is not called."""
    flops = count_flops(Stepping(), lambda model: model.training_step(ROW))
    assert flops.of_module == {"one": 2 * 4 * 8, "two": 2 * 8 * 2, "": 2 * 2 * 3}


def test_operators_of_operators_run_uncounted():
    flops = counted(Branching(), (ROW,))
    assert flops.of_module == {"head": 2 * 4 * 2}
    assert flops.uncounted == ("sum in Branching", "cond in Branching", "Linear")


def test_counting_leaves_flags_random_numbers_and_hooks():
    model = Moody().train()
    model.frozen.eval()
    random = torch.get_rng_state()
    count_flops(model, lambda each: each(ROW))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert no_hooks(model)
    with pytest.raises(RuntimeError):
        count_flops(model, lambda each: each(torch.ones(1, 3)))
    assert no_hooks(model)
    assert torch.backends.mha.get_fastpath_enabled()


def no_hooks(model):
    every = torch.nn.modules.module
    own = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not (own or every._global_forward_hooks or every._global_forward_pre_hooks)


def reference(model, inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


PLAIN = [name for name in CASES if "attention" not in name and name not in ("multihead", "island", "tied")]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", [0, 1])
def test_flops_are_those_of_the_slim_model(name, seed):
    case = CASES[name]
    model, inputs, channels = case.model(), case.inputs(), found(name)
    flops = FlopModel(copy.deepcopy(model), lambda m: m(*inputs), channels)
    full = {n: group.num_channels for n, group in channels.items()}
    assert flops(full) == reference(model, inputs)
    kept = random_kept(channels, seed)
    slimmed = slim(model, channels.to_masks(kept, dict(model.named_parameters())), inputs).model
    assert flops({n: int(f.sum()) for n, f in kept.items()}) == pytest.approx(reference(slimmed, inputs))


def test_flops_by_hand():
    case = CASES["depthwise"]
    model, inputs = case.model(), case.inputs()
    channels = find_channels(model, lambda m: m(*inputs))
    flops = FlopModel(model, lambda m: m(*inputs), channels)
    pixels = 2 * 4 * 4
    assert flops({"0": 8}) == 2 * pixels * (3 * 8 + 9 * 8 + 8 * 2)
    assert flops({"0": 5}) == pytest.approx(2 * pixels * (3 * 5 + 9 * 5 + 5 * 2))
    assert no_hooks(model)


@pytest.mark.parametrize("name", ["fused attention", "normed attention"])
def test_flops_with_attention_by_hand(name):
    """Its products count, and stay as they are; two sequences of 5 tokens, 4 heads of 4 numbers."""
    case = CASES[name]
    model, inputs, channels = case.model(), case.inputs(), found(name)
    flops = FlopModel(model, lambda m: m(*inputs), channels)
    widths = {n: group.num_channels for n, group in channels.items()}
    linear = 2 * 10 * (6 * 16 + 3 * 16 * 16 + 16 * 16 + 2 * 16 * 12) + 2 * 2 * 16 * 3
    products = 2 * (2 * 2 * 4 * 5 * 5 * 4)  # q @ k.T and weights @ v
    assert flops(widths) == flops.total == linear + products
    [heads] = [n for n, group in channels.items() if group.attributes]
    assert flops(widths | {heads: 2}) == pytest.approx(flops.total - 2 * 10 * (3 * 16 * 8 + 8 * 16))


def test_hooks_are_gone_after_an_error():
    model = CASES["depthwise"].model()
    with pytest.raises(RuntimeError):
        FlopModel(model, lambda m: m(torch.ones(1, 1, 1, 1)), found("depthwise"))
    assert no_hooks(model)
