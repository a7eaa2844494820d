"""One scheduled run of each module as it is found in the wild: it ends right, or is refused with a reason."""

import copy
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from altermoma_pl import Linear, Masks
from altermoma_pl.callback.state import PruningState
from tests.helpers import wild
from tests.helpers.lightning_models import assert_same, fit, nonzero_pruned, pruner

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lazy modules"),
    pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of .nn.Module."),
    pytest.mark.filterwarnings("ignore:ReRI of the group"),  # nets this small may have nothing redundant
    pytest.mark.filterwarnings("ignore:.* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
]

REFUSED = {
    wild.TiedStemOfBoth: "parameter 'net.backbone.0.weight' belongs to 2 modalities, 'camera' and 'lidar'",
    wild.FrozenTower: "modality 'camera' has nothing to prune: all of its 4 parameters are frozen",
    wild.LidarWithoutBackbone: "lidar: pattern 'net.lidar' matches no parameter of LidarWithoutBackbone;",
    wild.LazyForEver: "parameter 'net.head.1.weight' has no shape yet: run one batch through the lazy layers",
    wild.SometimesNone: "training_step returned no loss but NoneType",
}
RUN = [
    cls
    for cls in vars(wild).values()
    if isinstance(cls, type) and issubclass(cls, wild.Wild) and cls not in REFUSED
]


def run(module, callback, *others, **options):
    train, val = wild.batches(module.sizes), wild.batches(module.sizes, seed=1)
    return fit(module, callback, *others, train=train, val=val, **options)


def pruning(cls):
    return pruner(modalities=cls.modalities, schedule=Linear(0, 1))


@pytest.mark.parametrize("cls", RUN, ids=lambda cls: cls.__name__)
def test_a_scheduled_run_ends_right(cls, tmp_path):
    module, callback = cls(), pruning(cls)
    saved = ModelCheckpoint(tmp_path, "pruned")
    run(module, callback, saved, enable_checkpointing=True)
    assert [event["epoch"] for event in callback.events] == [0, 1]
    assert callback.masks.num_weights == cls.num_weights
    assert callback.masks.num_weights - callback.masks.num_kept == cls.num_weights // 2
    assert_zeros(module, callback.masks)
    checkpoint = torch.load(tmp_path / "pruned.ckpt", weights_only=cls is not wild.InjectedAndUnserialisable)
    plain = cls()
    if cls is wild.BuiltInConfigureModel:
        plain.configure_model()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert_zeros(plain, PruningState.from_state_dict(checkpoint["callbacks"]["AlterMOMACallback"]).masks)
    assert all(torch.isfinite(p).all() for p in plain.parameters())


def assert_zeros(module, masks: Masks):
    assert nonzero_pruned(module, masks) == 0
    zeros = sum(int((module.get_parameter(name) == 0).sum()) for name in masks)
    assert zeros == masks.num_weights - masks.num_kept


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_cannot_be_pruned_is_refused_and_left_as_it_was(cls):
    module, callback = cls(), pruning(cls)
    lazy = cls is wild.LazyForEver  # has no values to compare
    before = {} if lazy else copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=re.escape(REFUSED[cls])):
        run(module, callback)
    assert_same({} if lazy else module.state_dict(), before)
    assert callback.events == []


def test_a_model_of_one_sensor_is_refused():
    with pytest.raises(ValueError, match="at least two modalities are needed"):
        pruner(modalities={"camera": "net.camera"})


def test_constants_are_what_they_were():
    module = wild.GeometryConstants()
    callback = pruning(type(module))
    run(module, callback)
    assert module.net.camera.dx.tolist() == [0.5, 0.25]
    assert module.net.camera.nx.tolist() == [1, 0]


def test_frozen_layers_are_what_they_were():
    module = wild.FrozenPart()
    before = module.net.camera[0].weight.clone()
    run(module, pruning(type(module)))
    assert torch.equal(module.net.camera[0].weight, before)


def test_aliases_are_zero_under_both_names(tmp_path):
    module = wild.AliasedTower()
    callback = pruner(modalities=module.modalities, sparsity=0.8)
    run(module, callback, ModelCheckpoint(tmp_path, "pruned"), enable_checkpointing=True)
    saved = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    for index in (0, 1):
        name = f"net.backbone.{index}.weight"
        assert (saved[name] == 0).sum() > 0
        assert torch.equal(saved[name], saved[f"net.camera.{index}.weight"])


def test_weights_outside_the_optimizer_are_pruned_too():
    module = wild.OptimizerOverASubmodule()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = pruner(modalities=module.modalities, scope="layer")
    run(module, callback)
    for name in ("net.lidar.0.weight", "net.head.1.weight"):
        mask = callback.masks[name]
        assert int((~mask).sum()) == 4
        assert torch.equal(module.get_parameter(name), before[name] * mask)
