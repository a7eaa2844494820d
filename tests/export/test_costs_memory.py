"""Memory of a pass at once."""

import pytest
import torch
from torch import nn

from altermoma_pl.export.costs.measuring import peak_memory

CPU = torch.device("cpu")
ROW = torch.ones(1, 4)


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
