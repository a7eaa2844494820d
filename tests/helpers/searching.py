"""Short ways to search a model for channels and to write groups by hand."""

import pytest
import torch

from altermoma_pl.granularity.channels.finding import find_channels
from tests.helpers.coupled_channels import untouched
from tests.helpers.coupled_models import IMAGE

OUTPUT = "its channels are an output, or outputs become not finite"


def image():
    return torch.randn(IMAGE[0], generator=torch.Generator().manual_seed(0))


def search(model, x=None, **options):
    x = image() if x is None else x
    with untouched(model):
        return find_channels(model, lambda m: m(x), **options)


def refused(message, model, x=None, kind=ValueError, **options):
    x = image() if x is None else x
    with untouched(model), pytest.raises(kind, match=message):
        find_channels(model, lambda m: m(x), **options)


def slices(group):
    return {(each.name, each.dim): each.index.tolist() for each in group.slices}


def column(width, offset=0):
    return [[offset + c] for c in range(width)]
