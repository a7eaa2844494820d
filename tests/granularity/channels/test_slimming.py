import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from altermoma_pl.granularity.channels.finding import find_channels
from altermoma_pl.granularity.channels.resizing import slim_optimizer_states
from altermoma_pl.granularity.channels.slimming import slim
from altermoma_pl.mask.masks import Masks
from examples.data.datamodule import DrivingData
from examples.models.module import FusionModule
from tests.helpers.coupled_channels import found, masked, random_kept, random_masks, untouched
from tests.helpers.coupled_models import CASES, IMAGE, Net, chain, conv

SEEDS = st.integers(0, 2**31)


def rebuilt(model, state, attributes):
    """What a user does who has only torch, the dense model's code and the file."""
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
        setattr(module, leaf, nn.Parameter(value.clone()) if is_parameter else value.clone())
    for path, values in attributes.items():
        for attribute, value in values.items():
            setattr(model.get_submodule(path), attribute, value)
    return model


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_the_slim_model_is_the_masked_one(name, seed):
    case = CASES[name]
    model, inputs, channels = case.model(), case.inputs(), found(name)
    kept = random_kept(channels, seed)
    masks = channels.to_masks(kept, dict(model.named_parameters()))
    with untouched(model):
        slimmed = slim(model, masks, inputs, declared=case.declared)
    dense = masked(model, masks)
    with torch.no_grad():
        assert_close(slimmed.model(*inputs), dense(*inputs), rtol=1e-5, atol=1e-5)
        again = rebuilt(case.model(), slimmed.model.state_dict(), slimmed.attributes)
        assert torch.equal(again(*inputs), slimmed.model(*inputs))
    assert repr(again) == repr(slimmed.model)  # sizes of the layers, as torch prints them
    assert slimmed.widths == {n: (int(flags.sum()), len(flags)) for n, flags in kept.items()}
    assert slimmed.still_masked == {}
    assert slimmed.difference <= 1e-5
    state = {n: slimmed.resizing.resized(n, t) for n, t in dense.state_dict().items()}
    assert state.keys() == slimmed.model.state_dict().keys()
    assert all(torch.equal(t, state[n]) for n, t in slimmed.model.state_dict().items())
    for group in channels.groups:
        gone = int((~kept[group.name]).sum())
        for each in group.slices:
            others = sum(
                int((~kept[other.name]).sum()) * its.index.shape[1]
                for other in channels.groups
                for its in other.slices
                if other is not group and (its.name, its.dim) == (each.name, each.dim)
            )
            size = {**dict(model.named_parameters()), **dict(model.named_buffers())}[each.name].shape[
                each.dim
            ]
            assert state[each.name].shape[each.dim] == size - gone * each.index.shape[1] - others


def trained(model, inputs, masks=None, state=None):
    """One step of Adam; with `masks` their gradients are masked."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=1e-2)
    if state:
        optimizer.load_state_dict(copy.deepcopy(state))
    model(*inputs).square().sum().backward()
    if masks:
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", ["concat", "grouped", "fused attention", "tied", "flatten"])
def test_training_goes_on_as_that_of_the_masked_model(name):
    case = CASES[name]
    inputs, channels = case.inputs(), found(name)
    dense = case.model()
    masks = random_masks(channels, dense, 3)
    masks.apply_(dense)
    state = trained(dense, inputs, masks)
    slimmed = slim(dense, masks, inputs)
    names = dict(dense.named_parameters())
    [sliced] = slim_optimizer_states([state], names, slimmed.resizing)
    assert any(
        entry["exp_avg"].shape != sliced["state"][number]["exp_avg"].shape
        for number, entry in state["state"].items()
    )
    trained(dense, inputs, masks, state)
    trained(slimmed.model, inputs, state=sliced)
    expected = {n: slimmed.resizing.resized(n, t) for n, t in dense.state_dict().items()}
    assert_close(slimmed.model.state_dict(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "depthwise", "fused attention", "concat"])
def test_in_two_steps(name):
    case = CASES[name]
    model, inputs = case.model(), case.inputs()
    half = {n: torch.arange(g.num_channels) % 2 == 0 for n, g in found(name).items()}
    masks = found(name).to_masks(half, dict(model.named_parameters()))
    first = slim(model, masks, inputs)
    channels = find_channels(first.model, lambda m: m(*inputs))
    assert {n: g.num_channels for n, g in channels.items()} == {n: k for n, (k, _) in first.widths.items()}
    quarter = {n: torch.arange(g.num_channels) < g.num_channels // 2 for n, g in channels.items()}
    second = slim(first.model, channels.to_masks(quarter, dict(first.model.named_parameters())), inputs)
    both = {n: torch.zeros_like(flags) for n, flags in half.items()}
    for n, flags in half.items():
        both[n][flags.nonzero().flatten()[quarter[n]]] = True
    whole = masked(model, found(name).to_masks(both, dict(model.named_parameters())))
    assert {n: k for n, (k, _) in second.widths.items()} == {n: int(f.sum()) for n, f in both.items()}
    assert_close(second.model(*inputs), whole(*inputs), rtol=1e-5, atol=1e-5)


def test_attributes_by_hand():
    case = CASES["depthwise"]
    model = case.model()
    kept = {"0": torch.arange(8) < 3}
    masks = found("depthwise").to_masks(kept, dict(model.named_parameters()))
    slimmed = slim(model, masks, case.inputs())
    assert slimmed.attributes == {
        "0": {"out_channels": 3},
        "1": {"in_channels": 3, "out_channels": 3, "groups": 3},
        "3": {"in_channels": 3},
    }
    assert slimmed.model[1].weight.shape == (3, 1, 3, 3)


def test_attributes_of_attention_norms_and_both_owners_of_a_weight():
    for name, expected in {
        "fused attention": {"attention": {"num_heads": 2}, "fc2": {"in_features": 6}},
        "no affine": {"1": {"num_features": 4}},
        "instance norm": {"1": {"num_features": 4}},
        "tied": {
            "one": {"in_features": 4, "out_features": 3},
            "two": {"in_features": 4, "out_features": 3},
            "other": {"num_features": 3},
        },
    }.items():
        model, channels = CASES[name].model(), found(name)
        kept = {n: torch.arange(g.num_channels) % 2 == 0 for n, g in channels.items()}
        if "embed" in kept:
            kept["embed"][:] = True
        masks = channels.to_masks(kept, dict(model.named_parameters()))
        attributes = slim(model, masks, CASES[name].inputs()).attributes
        assert expected.items() <= attributes.items(), name


def test_what_is_tied_stays_so():
    model = CASES["tied"].model()
    slimmed = slim(model, random_masks(found("tied"), model, 0), CASES["tied"].inputs()).model
    assert slimmed.one.weight is slimmed.two.weight
    assert slimmed.norm.running_mean is slimmed.other.running_mean


def test_flags_are_those_of_the_model():
    case = CASES["residual"]
    model = case.model()
    masks = random_masks(found("residual"), model, 0)
    model.train()
    model.norm.eval()
    model.requires_grad_(False)  # frozen after it was pruned
    model.head.requires_grad_(True)
    with untouched(model):
        slimmed = slim(model, masks, case.inputs()).model
    assert [m.training for m in slimmed.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in slimmed.parameters()] == [p.requires_grad for p in model.parameters()]
    assert slimmed.a.out_channels < 6


@pytest.mark.slow
def test_the_whole_fusion_model(tmp_path, monkeypatch):
    data = DrivingData(
        num_train=2, num_val=2, num_calibration=2, batch_size=2, image_size=(48, 160), cache_dir=str(tmp_path)
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    model = FusionModule(
        size="tiny", num_map_classes=batch.segmentation.shape[1], image_size=(48, 160)
    ).eval()
    channels = find_channels(model, lambda m: m(batch))
    masks = random_masks(channels, model, 1)
    monkeypatch.setattr(
        "altermoma_pl.granularity.channels.slimming.find_channels", lambda *_, **__: channels
    )  # which takes its time
    with untouched(model):
        slimmed = slim(model, masks, (batch,))
    with torch.no_grad():
        one, other = slimmed.model(batch), masked(model, masks)(batch)
    assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert {name.split(".")[2] for name in channels if "encoders" in name} == {"camera", "lidar"}


def refused(model, masks, message, inputs=None):
    inputs = CASES["depthwise"].inputs() if inputs is None else inputs
    with untouched(model), pytest.raises(ValueError, match=message):
        slim(model, masks, inputs)


def test_errors_leave_the_model_as_it_was():
    model = CASES["depthwise"].model()
    good = random_masks(found("depthwise"), model, 0)
    parameters = dict(model.named_parameters())
    refused(model, Masks({"absent": torch.ones(3, dtype=torch.bool)}), "'absent' does not exist")
    refused(model, good, "there is no tensor among the example inputs", ())
    refused(model, good, "does not run on the example inputs", torch.ones(1))
    refused(model, good, "does not run on the example inputs", (torch.ones(2, 5, 4, 4),))
    refused(model, Masks.dense(parameters), r"no channel is pruned as a whole \(sparsity of the masks: 0\)")
    scattered = Masks({"0.weight": torch.rand(8, 3, 1, 1) < 0.9})
    refused(model, scattered, "no channel is pruned as a whole")
    none = found("depthwise").to_masks({"0": torch.zeros(8, dtype=torch.bool)}, parameters)
    refused(model, none, r"all channels of \['0'\] are pruned")


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo):
        raise RuntimeError("an open file")


def test_a_model_that_cannot_be_copied():
    model = CASES["depthwise"].model()
    masks = random_masks(found("depthwise"), model, 0)
    refused(Uncopied(*model).eval(), masks, "Uncopied cannot be copied: an open file")


class Mean(nn.Module):
    """Depends on the number of channels, but only while its parameter is zero."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x / x.shape[1] if self.gate == 0 else x + self.gate * x


def test_what_differs_in_the_end():
    model = chain(Mean()).eval()
    kept = torch.arange(8) < 5
    rows, columns = kept[:, None, None, None], kept[None, :, None, None]
    masks = Masks(
        {
            "0.weight": rows.expand(8, 3, 1, 1),
            "0.bias": kept,
            "3.weight": columns.expand(2, 8, 1, 1),
        }
    )
    refused(model, masks, r"Sequential gives something else than with zeros there.*removed from \['0'\]")


def test_zeros_that_stay_are_named():
    model = Net(
        lambda m, x: m.head(torch.relu(m.norm(m.a(torch.relu(m.stem(x)))))),
        stem=conv(3, 8), a=conv(8, 6), norm=nn.GroupNorm(1, 6), head=conv(6, 2),
    ).eval()  # fmt: skip
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["stem.weight"][:4] = False
    masks["stem.bias"][:4] = False
    masks["a.weight"][:, :4] = False
    masks["a.weight"][:3] = False
    inputs = tuple(torch.randn(shape) for shape in IMAGE)
    slimmed = slim(model, Masks(masks), inputs)
    assert slimmed.widths == {"stem": (4, 8)}
    assert slimmed.still_masked.keys() == {"a"}
    assert slimmed.still_masked["a"].startswith("3 of 6 channels are zero but stay: what is left depends on")


def test_zeros_of_which_not_all_is_pruned():
    model = CASES["residual"].model()
    half = {"stem": torch.arange(8) < 4, "a": torch.arange(6) < 3}
    masks = dict(found("residual").to_masks(half, dict(model.named_parameters())))
    del masks["b.bias"]  # of the channels that are added to those of the stem
    masks["b.weight"] = half["a"][None, :, None, None].expand(8, 6, 3, 3)
    slimmed = slim(model, Masks(masks), CASES["residual"].inputs())
    assert slimmed.still_masked == {
        "stem": "4 of 8 channels are zero but stay: not all that is coupled with them is pruned"
    }
