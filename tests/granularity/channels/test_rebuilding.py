import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from altermoma_pl.export.run import recalibrate_
from altermoma_pl.granularity.channels.resizing import (
    Resizing,
    reshape_like_,
    slim_entry,
    slim_optimizer_states,
)
from altermoma_pl.granularity.channels.slimming import slim
from tests.helpers.coupled_channels import found, random_masks, untouched
from tests.helpers.coupled_models import CASES


def slimmed(name):
    case = CASES[name]
    model = case.model()
    return slim(model, random_masks(found(name), model, 2), case.inputs(), declared=case.declared)


@pytest.mark.parametrize("name", CASES)
def test_a_dense_model_gets_the_shapes_and_attributes(name):
    smaller = slimmed(name)
    file = io.BytesIO()
    torch.save([smaller.model.state_dict(), slim_entry(smaller.attributes, smaller.widths)], file)
    file.seek(0)
    state, entry = torch.load(file, weights_only=True)
    model = CASES[name].make().eval()
    first = next(model.parameters()).requires_grad_(False)
    reshape_like_(model, state, entry)
    assert not next(model.parameters()).requires_grad
    assert next(model.parameters()).shape != first.shape or next(model.parameters()) is first
    model.load_state_dict(state)
    assert repr(model) == repr(smaller.model)
    inputs = CASES[name].inputs()
    assert torch.equal(model(*inputs), smaller.model(*inputs))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats_stay(memory_format):
    case, masks = CASES["residual"], random_masks(found("residual"), CASES["residual"].model(), 2)
    smaller = slim(case.model().to(memory_format=memory_format), masks, case.inputs())
    again = CASES["residual"].make().to(memory_format=memory_format)
    reshape_like_(again, smaller.model.state_dict(), slim_entry(smaller.attributes, smaller.widths))
    momentum = torch.rand(6, 8, 3, 3).to(memory_format=memory_format)
    tensors = [smaller.model.a.weight, again.a.weight, smaller.resizing.resized("a.weight", momentum)]
    for tensor in tensors:
        assert tensor.shape[1:] == (smaller.widths["stem"][0], 3, 3)
        assert tensor.is_contiguous(memory_format=memory_format)


def test_what_is_tied_stays_so():
    smaller = slimmed("tied")
    model = CASES["tied"].make()
    reshape_like_(model, smaller.model.state_dict(), slim_entry(smaller.attributes, smaller.widths))
    assert model.one.weight is model.two.weight
    assert model.norm.running_mean is model.other.running_mean
    assert model.one.weight.shape == smaller.model.one.weight.shape


def test_the_entry_by_hand():
    entry = slim_entry({"a": {"out_channels": 3}}, {"a": (3, 8)}, {"a": "camera"})
    assert entry == {
        "format": 1,
        "attributes": {"a": {"out_channels": 3}},
        "widths": {"a": [3, 8]},
        "modalities": {"a": "camera"},
    }


@pytest.mark.parametrize("entry", [None, {}, {"format": 2, "attributes": {}}, {"format": 1}, [1]])
def test_entries_of_something_else(entry):
    model = CASES["residual"].model()
    with (
        untouched(model),
        pytest.raises(ValueError, match="is not that of a slim model: it needs an entry 'slim'"),
    ):
        reshape_like_(model, model.state_dict(), entry)


def test_other_models():
    smaller = slimmed("residual")
    entry = slim_entry(smaller.attributes, smaller.widths)
    state = smaller.model.state_dict()
    model = CASES["residual"].model()

    def refused(message, state, entry=entry):
        with untouched(model), pytest.raises(ValueError, match=message):
            reshape_like_(model, state, entry)

    refused(r"is of another model than Net: they differ in \['more'\]", {**state, "more": torch.ones(1)})
    refused(r"\['stem.bias'\]", {n: t for n, t in state.items() if n != "stem.bias"})
    refused(r"\['stem.bias'\]", {**state, "stem.bias": torch.ones(9)})
    refused(r"\['stem.bias'\]", {**state, "stem.bias": torch.ones(1, 1)})
    refused(r"\['absent'\]", state, slim_entry({"absent": {"groups": 1}}, {}))


class Counting(nn.Linear):
    """Saves something beside its tensors."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_extra_state_is_passed_over():
    model = nn.Sequential(Counting(2, 4))
    smaller = nn.Sequential(Counting(2, 3))
    reshape_like_(model, smaller.state_dict(), slim_entry({"0": {"out_features": 3}}, {}))
    model.load_state_dict(smaller.state_dict())
    assert_close(model[0].weight, smaller[0].weight)
    assert model[0].calls == 3


def resizing():
    return Resizing({"0.weight": {0: torch.tensor([0, 2])}, "0.bias": {0: torch.tensor([0, 2])}}, {})


def stepped(*optimizers, model):
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [optimizer.state_dict() for optimizer in optimizers]


def test_states_of_two_optimizers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    adam = torch.optim.Adam(model[0].parameters(), amsgrad=True)
    states = stepped(adam, torch.optim.SGD(model[1].parameters(), momentum=0.9), model=model)
    before = copy.deepcopy(states)
    first, second = slim_optimizer_states(states, dict(model.named_parameters()), resizing())
    weight, bias = first["state"][0], first["state"][1]
    assert weight.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert torch.equal(weight["exp_avg"], before[0]["state"][0]["exp_avg"][[0, 2]])
    assert torch.equal(weight["max_exp_avg_sq"], before[0]["state"][0]["max_exp_avg_sq"][[0, 2]])
    assert torch.equal(bias["exp_avg_sq"], before[0]["state"][1]["exp_avg_sq"][[0, 2]])
    assert weight["step"].item() == 1
    assert first["param_groups"] == before[0]["param_groups"]
    assert torch.equal(second["state"][0]["momentum_buffer"], before[1]["state"][0]["momentum_buffer"])
    assert states[0]["state"][0]["exp_avg"].shape == (3, 2)


def test_states_of_unknown_owners():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    [state] = stepped(torch.optim.SGD(model[0].parameters(), momentum=0.9), model=model)
    with pytest.raises(ValueError, match="the optimizers hold 2 parameters and the model 4 that are trained"):
        slim_optimizer_states([state], dict(model.named_parameters()), resizing())


def test_states_of_other_shapes():
    model = nn.Sequential(nn.Linear(2, 3))
    [state] = stepped(torch.optim.SGD(model.parameters(), momentum=0.9), model=model)
    state["state"][0]["factor"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"the state 'factor' of '0.weight' has another shape"):
        slim_optimizer_states([state], dict(model.named_parameters()), resizing())


def normed():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.9), nn.ReLU())
    model[1].running_mean.fill_(100)
    model.train()
    model[3].eval()
    return model


def test_running_statistics_are_means_over_batches():
    model = normed()
    batches = [torch.randn(4, 2), torch.randn(6, 2)]
    weights = [p.clone() for p in model.parameters()]
    assert recalibrate_(model, iter(batches), lambda m, x: m(x)) == 2
    hidden = [model[0](x) for x in batches]
    assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert model[1].num_batches_tracked == 2
    assert model[1].momentum == 0.3
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_all_but_norms_is_evaluated():
    model = normed()
    seen = []
    recalibrate_(model, [torch.randn(4, 2)], lambda m, x: seen.append([each.training for each in m]) or m(x))
    assert seen == [[False, True, False, False]]


def test_recalibration_without_norms_or_batches():
    with pytest.raises(ValueError, match="Sequential has no batch norm with running statistics"):
        recalibrate_(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), [], lambda m, x: m(x))
    model = normed()
    with untouched(model), pytest.raises(ValueError, match="there is no batch to measure"):
        recalibrate_(model, [], lambda m, x: m(x))
    assert model[1].momentum == 0.3


def test_modes_and_momentum_come_back_after_an_error():
    model = normed()
    with pytest.raises(RuntimeError):
        recalibrate_(model, [torch.randn(4, 5)], lambda m, x: m(x))
    assert model[1].momentum == 0.3
    assert [m.training for m in model] == [True, True, True, False]
