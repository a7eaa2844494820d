"""Channels of the small models, random choices of them, and what tells that a model was left alone."""

import copy
from contextlib import contextmanager
from functools import cache

import torch

from altermoma_pl.granularity.channels.finding import find_channels
from tests.helpers.coupled_models import CASES


@cache
def found(name):
    case = CASES[name]
    inputs = case.inputs()
    return find_channels(case.model(), lambda model: model(*inputs), declared=case.declared)


def random_kept(channels, seed):
    """At least one channel of each group; of the first at least one goes."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, group in channels.items():
        most = group.num_channels - (not kept)
        count = int(torch.randint(1, most + 1, (), generator=generator))
        kept[name] = torch.zeros(group.num_channels, dtype=torch.bool)
        kept[name][torch.randperm(group.num_channels, generator=generator)[:count]] = True
    return kept


def random_masks(channels, model, seed):
    return channels.to_masks(random_kept(channels, seed), dict(model.named_parameters()))


def masked(model, masks):
    model = copy.deepcopy(model)
    masks.apply_(model)
    return model


@contextmanager
def untouched(model):
    """Every bit of a model and of the generator is as before, and no object is another."""

    def state():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        flags = [(m.training, repr(m)) for m in model.modules()]
        trained = [(p.requires_grad, p.grad) for p in model.parameters()]
        return tensors, flags, trained, torch.get_rng_state()

    tensors, flags, trained, generator = state()
    copies = {name: t.clone() for name, t in tensors.items()}
    yield
    after = state()
    assert {n: id(t) for n, t in after[0].items()} == {n: id(t) for n, t in tensors.items()}
    assert all(torch.equal(t, copies[name]) for name, t in after[0].items())
    assert after[1:3] == (flags, trained)
    assert torch.equal(after[3], generator)
