import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from altermoma_pl import Modalities, deactivated, restored
from altermoma_pl.model.contexts import modes_restored, noise_free, seed_generators
from tests.helpers.models import BRANCHES, Aliased, Compiled, Geometry, ThreeModalities, snapshot, two_tower


class Stateful(nn.Module):
    """Everything that a module may remember."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.integers = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
        self.register_buffer("bank", torch.arange(3.0))
        self.register_buffer("later", None)
        self.register_buffer("count", torch.tensor(5))
        self.metric = torchmetrics.MeanMetric()
        self.cat = torchmetrics.CatMetric()
        self.steps = 3
        self.history = [1, torch.tensor(2.0)]
        self.cache = {"a": torch.tensor([1.0]), "b": [torch.tensor(4.0)]}
        self.ordered = OrderedDict(x=1)
        self.memory = torch.tensor([1.0, 2.0])


def touch_everything(model):
    """Change each kind of state once."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.layer.requires_grad_(False)
    model.frozen.requires_grad_(True)
    model.layer.weight.grad = torch.ones(2, 2)
    model.norm.running_mean.add_(1)
    model.norm.num_batches_tracked.add_(1)
    model.bank = torch.zeros(7)
    model.later = torch.ones(1)
    model.count.add_(1)
    model.metric.update(3.0)
    model.cat.update(3.0)
    model.steps += 1
    model.history.append("new")
    model.history[1].add_(1)
    model.cache["a"].zero_()
    model.cache["b"].append(1)
    model.cache["c"] = 0
    model.ordered["y"] = 2
    model.memory.mul_(2)
    model.anything = "new"
    model.layer.register_buffer("extra", torch.ones(1))
    torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(99)


@pytest.fixture
def stateful():
    model = Stateful().train()
    model.frozen.eval()
    model.layer.weight.grad = torch.full((2, 2), 7.0)
    model.metric.update(1.0)
    model.cat.update(1.0)
    return model


def _stop(act, subject):
    act(subject)
    raise KeyboardInterrupt


def plain_state(model):
    return (
        model.steps,
        model.history[0],
        float(model.history[1]),
        len(model.history),
        list(model.cache),
        model.cache["a"].tolist(),
        len(model.cache["b"]),
        dict(model.ordered),
        model.memory.tolist(),
        float(model.metric.compute()),
        model.metric._update_count,
        model.cat.compute().tolist(),
        hasattr(model, "anything"),
        hasattr(model.layer, "extra"),
    )


def test_everything_comes_back(stateful):
    before, plain = snapshot(stateful), plain_state(stateful)
    assert plain == (3, 1, 2.0, 2, ["a", "b"], [1.0], 1, {"x": 1}, [1.0, 2.0], 1.0, 1, 1.0, False, False)
    with restored(stateful):
        touch_everything(stateful)
        changed = snapshot(stateful)
        assert changed.keys() ^ before.keys() == {"buffer layer.extra"}
        assert {kind.split()[0] for kind in before if changed[kind] != before[kind]} >= {
            *("parameter", "buffer", "gradient", "requires_grad", "training", "rng"),
        }
        assert plain_state(stateful)[0] == 4
    assert snapshot(stateful) == before
    assert plain_state(stateful) == plain


def test_everything_comes_back_after_an_exception(stateful):
    before, plain = snapshot(stateful), plain_state(stateful)
    with pytest.raises(KeyboardInterrupt), restored(stateful):
        _stop(touch_everything, stateful)
    assert snapshot(stateful) == before
    assert plain_state(stateful) == plain


def test_the_objects_are_the_same(stateful):
    stateful.layer.weight.grad = gradient = torch.ones(2, 2)
    objects = [*stateful.parameters(), *stateful.buffers(), stateful.history, stateful.cache, stateful.memory]
    with restored(stateful):
        touch_everything(stateful)
        stateful.layer.weight = nn.Parameter(torch.zeros(2, 2))
        stateful.history = []
    after = [*stateful.parameters(), *stateful.buffers(), stateful.history, stateful.cache, stateful.memory]
    assert [id(o) for o in after] == [id(o) for o in objects]
    assert stateful.layer.weight.grad is gradient
    assert stateful.later is None
    assert stateful.layer.bias.grad is None


def test_gradients_are_none_inside(stateful):
    with restored(stateful):
        assert all(parameter.grad is None for parameter in stateful.parameters())
    assert stateful.layer.weight.grad.tolist() == [[7, 7], [7, 7]]


def test_reset_brings_back_at_once_and_the_context_goes_on(stateful):
    before = snapshot(stateful)
    with restored(stateful) as reset:
        at_entry = snapshot(stateful)
        for _ in range(2):
            touch_everything(stateful)
            reset()
            assert snapshot(stateful) == at_entry
        touch_everything(stateful)
    assert snapshot(stateful) == before


def test_draws_are_repeated_after_it():
    with restored(nn.Linear(1, 1)):
        inside = torch.rand(2).tolist(), np.random.rand(), random.random()
    assert inside == (torch.rand(2).tolist(), np.random.rand(), random.random())


def test_tensors_that_are_pointed_elsewhere_come_back():
    model = nn.Linear(2, 1)
    memory = model.weight.data_ptr()
    before = snapshot(model)
    with restored(model):
        model.weight.data = torch.zeros(1, 2)
    assert snapshot(model) == before
    assert model.weight.data_ptr() == memory


@pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf"), 1e-45])
def test_special_bits_come_back(value):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    before = snapshot(model)
    with restored(model):
        nn.init.zeros_(model.weight)
    assert snapshot(model) == before


def test_tensors_with_nan_that_do_not_change_are_not_written():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, float("nan"))
    version = model.weight._version
    with restored(model):
        pass
    assert model.weight._version == version


def test_unchanged_tensors_are_not_written():
    model = nn.Linear(2, 1)
    version = model.weight._version
    with restored(model):
        model(torch.ones(1, 2))
    assert model.weight._version == version


def test_the_order_of_names_comes_back():
    model = nn.Linear(2, 1)
    weight = model.weight
    with restored(model):
        del model.weight
        model.weight = weight
        assert [name for name, _ in model.named_parameters()] == ["bias", "weight"]
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]


def test_modules_of_older_torch_keep_parameters_in_ordered_dicts():
    model = nn.BatchNorm1d(2)
    object.__setattr__(model, "_parameters", OrderedDict(model._parameters))
    object.__setattr__(model, "_buffers", OrderedDict(model._buffers))
    before = snapshot(model)
    with restored(model):
        model(torch.randn(5, 2))
        model.running_var = torch.ones(9)
        with torch.no_grad():
            model.weight.zero_()
    assert snapshot(model) == before


def test_sparse_buffers_and_expanded_ones_do_no_harm():
    model = nn.Linear(2, 1)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("expanded", torch.ones(1).expand(3))
    before = model.sparse
    with restored(model):
        model.sparse = torch.zeros(2)
    assert model.sparse is before


@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_a_deactivated_branch_gives_exact_zeros(modality):
    model = two_tower().eval()
    names = Modalities(BRANCHES).resolve(model)[modality]
    before = snapshot(model)
    with deactivated(model, names):
        assert all(not model.get_parameter(name).any() for name in names)
        inputs = torch.ones(5, 3 if modality == "camera" else 2)
        assert torch.equal(getattr(model, modality)(inputs), torch.zeros(5, 4))
        others = snapshot(model)
    assert {key for key in before if before[key] != others[key]} == {f"parameter {name}" for name in names}
    assert snapshot(model) == before


def test_the_gradient_of_a_deactivated_branch_is_exactly_zero():
    model = ThreeModalities()
    with deactivated(model, ["lidar.weight"]):
        output = model(*torch.tensor([[[2.0]], [[3.0]], [[5.0]]]))
        assert output.item() == 4 * 1 * 2 + 6 * 3 * 5
        output.backward()
    assert model.lidar.weight.grad.item() == 5 * 3  # the weight's, through the head
    assert model.head.weight.grad.tolist() == [[2, 0, 15]]
    assert model.lidar.weight.item() == 2


def test_a_deactivated_branch_of_two_layers_has_no_gradient_at_all():
    model = two_tower().eval()
    names = Modalities(BRANCHES).resolve(model)["camera"]
    with deactivated(model, names):
        model(torch.randn(5, 3), torch.randn(5, 2)).sum().backward()
    inner = [name for name in names if name.startswith("camera.0")]
    assert all(not model.get_parameter(name).grad.any() for name in inner)
    assert model.lidar[0].weight.grad.any()


def test_special_values_come_back_bit_for_bit_also_after_an_exception():
    model = nn.Linear(4, 1, bias=False)
    special = torch.tensor([[-0.0, float("nan"), float("-inf"), 1e-45]])
    with torch.no_grad():
        model.weight.copy_(special)
    inside = []
    with pytest.raises(KeyboardInterrupt), deactivated(model, ["weight"]):
        _stop(inside.append, model.weight.detach().clone())
    assert torch.equal(inside[0].view(torch.int32), torch.zeros(1, 4, dtype=torch.int32))
    assert torch.equal(model.weight.view(torch.int32), special.view(torch.int32))


def test_changes_inside_are_undone():
    model = nn.Linear(1, 1, bias=False)
    before = snapshot(model)
    with deactivated(model, ["weight"]), torch.no_grad():
        model.weight.fill_(3)
    assert snapshot(model) == before


def test_geometry_survives_deactivation():
    model = Geometry()
    with deactivated(model, Modalities(BRANCHES).resolve(model)["camera"]):
        assert model.camera.dx.tolist() == [0.5, 0.25]
        assert torch.isfinite(model(torch.ones(2, 3), torch.ones(2, 2))).all()


def test_aliased_and_compiled_modules_are_deactivated():
    for model in (Aliased(), Compiled(Aliased())):
        with deactivated(model, Modalities(BRANCHES).resolve(model)["camera"]):
            net = getattr(model, "_orig_mod", model)
            assert not net.camera(torch.ones(1, 3)).any()
            assert net.lidar(torch.ones(1, 3)).any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["camera"],
            "cannot deactivate ['camera']: give names of parameters of Aliased, as Modalities.resolve",
        ),
        (
            [],
            "cannot deactivate nothing: give names of parameters of Aliased",
        ),
    ],
)
def test_what_cannot_be_deactivated_is_named(names, message):
    model = Aliased()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)), deactivated(model, names):
        pass
    assert snapshot(model) == before


class DropPath(nn.Module):
    """A stand-in for stochastic depth."""

    def forward(self, x):
        return x * torch.randint(0, 2, ()) if self.training else x


def test_noise_free_keeps_statistics_and_drops_nothing():
    model = two_tower()
    model.camera.append(DropPath())
    model.lidar.append(nn.Dropout(0.9))
    inputs = torch.randn(5, 3), torch.randn(5, 2)
    before = snapshot(model)
    with noise_free(model):
        outputs = {tuple(model(*inputs).flatten().tolist()) for _ in range(5)}
        assert model.training
        assert model.camera[0].training
        assert not model.camera[1].training
    assert len(outputs) == 1
    assert outputs == {tuple(model.eval()(*inputs).flatten().tolist())}
    model.train()
    assert snapshot(model) == before


def test_noise_free_switches_attention_dropout_off():
    attention = nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True)
    x = torch.randn(1, 6, 4)
    with noise_free(attention):
        first, second = attention(x, x, x)[0], attention(x, x, x)[0]
    assert torch.equal(first, second)
    assert attention.training


def test_noise_free_brings_frozen_flags_back_after_an_exception():
    model = two_tower()
    model.camera[1].eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), noise_free(model):
        raise RuntimeError("stop")
    assert snapshot(model) == before
    assert not model.camera[1].training


def test_flags_come_back_also_after_an_exception():
    model = two_tower()
    model.camera[1].eval()
    with pytest.raises(ZeroDivisionError), modes_restored(model):
        model.eval().camera[1].train(1 / 0)
    assert [name for name, module in model.named_modules() if not module.training] == ["camera.1"]


def test_norms_without_running_statistics_keep_their_mode():
    model = nn.BatchNorm1d(2, track_running_stats=False)
    with noise_free(model):
        assert model.training


def test_seeding_repeats_all_draws():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    seed_generators(3)
    first = draw()
    seed_generators(4)
    other = draw()
    seed_generators(3)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))
    seed_generators(-1)  # numpy alone takes none below zero
