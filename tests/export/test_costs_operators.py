"""What the operators of a pass do: FLOPs by hand, what is not counted, and memory at once."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import grid_sample, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from altermoma_pl.export.costs import count_flops, peak_memory

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
