"""Checkpoints: resuming equals not stopping, the weights are plain, damaged states are refused."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from altermoma_pl import Cubic, Linear, OneShot
from altermoma_pl.callback.state import PruningState
from tests.helpers.lightning_models import (
    PRUNABLE,
    Fusion,
    assert_same,
    dataset,
    fit,
    loader,
    num_zeros,
    pruner,
    trainer,
)
from tests.helpers.masks import shrank
from tests.helpers.resuming import KEY, Steady, at, checkpoints, outcome, resumed

SCHEDULE = Linear(0, 4, every=2)  # events at 0, 2 and 4
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint")


@pytest.mark.parametrize("after_training", [True, False], ids=["on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_after_any_epoch_is_not_stopping(optimizer, after_training, tmp_path):
    module, callback = Steady(optimizer), pruner(sparsity=0.8, schedule=SCHEDULE)
    saved = checkpoints(tmp_path, save_on_train_epoch_end=after_training)
    ran = fit(module, callback, saved, max_epochs=6, enable_checkpointing=True)
    expected = outcome(module, ran, callback)
    paths = [tmp_path / f"epoch={epoch}-step={4 * epoch + 4}.ckpt" for epoch in range(6)]
    assert sorted(tmp_path.iterdir()) == paths
    assert [event["epoch"] for event in callback.events] == [0, 2, 4]
    for path in paths:
        again, fresh = Steady(optimizer), pruner(sparsity=0.8, schedule=SCHEDULE)
        went_on = resumed(path, again, fresh, max_epochs=6)
        assert_same(outcome(again, went_on, fresh), expected)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_resuming_after_any_step_is_not_stopping(tmp_path):
    x, y = dataset(8).tensors
    same = TensorDataset(x.repeat(4, 1), y.repeat(4, 1))  # Lightning restarts the loader of an epoch

    def train() -> DataLoader[Any]:
        return DataLoader(same, 8)

    module, callback = Steady("sgd"), pruner(sparsity=0.8, schedule=Linear(0, 2))
    saved = checkpoints(tmp_path, every_n_train_steps=1)
    ran = fit(module, callback, saved, train=train(), max_epochs=4, enable_checkpointing=True)
    expected = outcome(module, ran, callback)
    assert len(list(tmp_path.iterdir())) == 16
    for path in tmp_path.iterdir():
        again, fresh = Steady("sgd"), pruner(sparsity=0.8, schedule=Linear(0, 2))
        went_on = resumed(path, again, fresh, train=train(), max_epochs=4)
        assert_same(outcome(again, went_on, fresh), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of four epochs with events at 0, 1 and 2, to 20, 40 and 60 zeros of 120."""
    path = tmp_path_factory.mktemp("checkpoints")
    callback = pruner(sparsity=0.5, schedule=Linear(0, 2))
    fit(Steady(), callback, checkpoints(path), max_epochs=4, enable_checkpointing=True)
    return path


@pytest.mark.parametrize(("epoch", "zeros"), [(0, 20), (1, 40), (2, 60), (3, 60)])
def test_checkpoints_hold_plain_weights_with_exact_zeros(folder, epoch, zeros):
    checkpoint = torch.load(at(folder, epoch), weights_only=True)
    plain = Fusion()
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert num_zeros(plain) == zeros
    state = PruningState.from_state_dict(checkpoint["callbacks"][KEY])
    assert state.masks.num_weights - state.masks.num_kept == zeros
    assert all(plain.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in state.masks.items())


def test_without_our_package_a_checkpoint_goes_on(folder):
    module = Fusion()
    built = trainer()
    with pytest.warns(UserWarning, match="AlterMOMACallback"):
        built.fit(module, loader(), loader(seed=1), ckpt_path=at(folder, 1))
    assert built.current_epoch == 3


def test_the_state_holds_tensors_and_builtins_and_goes_round(folder):
    state = torch.load(at(folder, 2), weights_only=True)["callbacks"][KEY]
    callback = pruner()
    callback.load_state_dict(copy.deepcopy(state))
    assert_same(callback.state_dict(), state)
    assert state.keys() == {
        "format", "masks", "group_of", "last_event_epoch", "events", "components", "rewind_point",
    }  # fmt: skip
    assert state["last_event_epoch"] == 2
    assert callback.report().sparsity == 0.5
    assert callback.report().losses == callback.events[-1]["losses"]


def test_the_state_before_fit_goes_round():
    callback, other = pruner(), pruner()
    other.load_state_dict(callback.state_dict())
    assert_same(other.state_dict(), callback.state_dict())
    assert other.masks is None


def test_without_components_the_state_is_small(folder):
    callback = pruner(store_components=False)
    fit(Fusion(), callback)
    assert callback.state_dict()["components"] is None
    num_bytes = sum(entry["bits"].numel() for entry in callback.state_dict()["masks"].values())
    assert num_bytes == 15  # 120 bits: 3 + 4 + 3 + 4 + 1 bytes


# Damage.


def _without(key: str) -> Any:
    return lambda state: state.pop(key)


def _with(key: str, value: Any) -> Any:
    return lambda state: state.update({key: value})


def _other_group(state: dict[str, Any]) -> None:
    state["group_of"]["camera.9.weight"] = state["group_of"].pop("camera.0.weight")


def _short_bits(state: dict[str, Any]) -> None:
    state["masks"]["head.weight"]["bits"] = torch.zeros(0, dtype=torch.uint8)


def _no_bits(state: dict[str, Any]) -> None:
    del state["masks"]["head.weight"]["bits"]


def _no_deci(state: dict[str, Any]) -> None:
    del state["components"]["deci"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((_without(key), "is damaged: state must hold") for key in PruningState().state_dict()),
        (_with("more", 1), "is damaged: state must hold"),
        (_with("format", 1), "has format 1, this version reads 2"),
        (_other_group, "masks and groups differ"),
        (_with("masks", None), "masks and groups differ"),
        (_short_bits, "which is not so at 'head.weight': ValueError"),
        (_no_bits, r"state.masks.head.weight must hold \['bits', 'shape'\]"),
        (_no_deci, "state.components must hold"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(folder, damage, message):
    state = torch.load(at(folder, 2), weights_only=True)["callbacks"][KEY]
    callback = pruner()
    callback.load_state_dict(copy.deepcopy(state))
    damage(broken := copy.deepcopy(state))
    with pytest.raises(ValueError, match=message):
        callback.load_state_dict(broken)
    assert_same(callback.state_dict(), state)


def test_a_damaged_checkpoint_is_refused_by_fit(folder, tmp_path):
    checkpoint = torch.load(at(folder, 1), weights_only=True)
    del checkpoint["callbacks"][KEY]["masks"]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    callback = pruner()
    with pytest.raises(ValueError, match="the pruning state in the checkpoint is damaged"):
        trainer(callback).fit(Fusion(), loader(), loader(seed=1), ckpt_path=tmp_path / "damaged.ckpt")
    assert callback.masks is None


class Wide(Fusion):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, 2)


class Deep(Fusion):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(1, 1)


class Renamed(Fusion):
    def __init__(self) -> None:
        super().__init__()
        self.neck = self.head
        del self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neck(torch.cat([self.camera(x[:, :3]), self.lidar(x[:, 3:])], dim=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wide, r"mask of 'head.weight' has shape \(1, 8\), the parameter has \(2, 8\)"),
        (Deep, r"prunable weights differ in \['extra.weight'\]"),
        (Renamed, "masked parameter 'head.weight' does not exist in Renamed"),
    ],
)
def test_masks_of_another_model_are_refused_and_change_nothing(folder, model, message):
    callback, module = pruner(), model()
    callback.load_state_dict(torch.load(at(folder, 2), weights_only=True)["callbacks"][KEY])
    before, state = copy.deepcopy(module.state_dict()), callback.state_dict()
    with pytest.raises(ValueError, match=message):
        fit(module, callback)
    assert_same(module.state_dict(), before)
    assert_same(callback.state_dict(), state)


def test_masks_of_other_prunable_patterns_are_refused(folder):
    with pytest.raises(ValueError, match=r"prunable weights differ in \['head.weight'\]"):
        resumed(at(folder, 1), Steady(), pruner(prunable=["!head"]))


# Another sparsity on resume.


@pytest.mark.parametrize(
    ("epoch", "sparsity", "zeros"), [(0, 0.8, 96), (1, 0.8, 96), (1, 0.4, 48), (3, 0.5, 60)]
)
def test_the_sparsity_may_be_raised_or_lowered_to_what_is_pruned(folder, epoch, sparsity, zeros):
    module, callback = Steady(), pruner(sparsity=sparsity, schedule=Linear(0, 2))
    resumed(at(folder, epoch), module, callback, max_epochs=5)
    assert num_zeros(module) == zeros


@pytest.mark.parametrize("sparsity", [0.4, 0.0, {"camera": 0.0, "lidar": 0.0, "shared": 0.0}])
def test_a_sparsity_below_what_is_pruned_is_refused(folder, sparsity):
    scope = "modality" if isinstance(sparsity, dict) else "global"
    callback = pruner(sparsity=sparsity, scope=scope, schedule=Linear(0, 2))
    with pytest.raises(ValueError, match="is below what is already pruned"):
        resumed(at(folder, 3), Steady(), callback, max_epochs=6)


def test_a_sparsity_that_no_event_is_left_for_is_refused(folder):
    callback = pruner(sparsity=0.8, schedule=Linear(0, 2))
    with pytest.raises(
        ValueError,
        match=r"at epoch 2, but this run goes on at epoch 4, where a share of 0.3 of the weights is",
    ):
        resumed(at(folder, 3), Steady(), callback, max_epochs=6)
    assert callback.masks.sparsity == 0.5


def test_a_schedule_that_is_over_before_a_dense_checkpoint_is_refused(tmp_path):
    fit(Steady(), checkpoints(tmp_path), max_epochs=3, enable_checkpointing=True)
    with pytest.raises(
        ValueError,
        match=r"at epoch 1, but this run goes on at epoch 3, where a share of 0.5 of the weights is",
    ):
        resumed(at(tmp_path, 2), Steady(), pruner(schedule=OneShot(1)), max_epochs=5)
    module = Steady()
    resumed(at(tmp_path, 2), module, pruner(schedule=OneShot(3)), max_epochs=5)
    assert num_zeros(module) == 60


def test_a_later_schedule_goes_on_from_what_is_pruned(folder):
    module, callback = Steady(), pruner(sparsity=0.8, schedule=Linear(2, 4))
    resumed(at(folder, 1), module, callback, max_epochs=6)
    # A third of 96 is less than the 40 that are pruned: there is nothing to do at epoch 2.
    assert [round(120 * event["sparsity"]) for event in callback.events] == [20, 40, 64, 96]
    assert [event["epoch"] for event in callback.events] == [0, 1, 3, 4]
    assert num_zeros(module) == 96


@pytest.mark.filterwarnings("ignore:(DeCI|ReRI) of the group")
def test_masks_only_shrink_over_a_resume(folder):
    first = PruningState.from_state_dict(torch.load(at(folder, 0), weights_only=True)["callbacks"][KEY])
    callback = pruner(sparsity=0.8, schedule=Cubic(0, 2), seed=5)
    resumed(at(folder, 0), Steady(), callback, max_epochs=3)
    assert shrank(callback.masks, first.masks)


def test_masks_of_another_run_are_refused_for_a_new_model():
    callback = pruner(schedule=OneShot(0))
    fit(Steady(), callback, max_epochs=1)
    fresh = Steady()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="give a new model a new callback"):
        fit(fresh, callback, max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_run_that_ends_before_the_last_event_says_so():
    callback = pruner(schedule=Cubic(0, 5))
    with pytest.warns(UserWarning, match="training ended at a sparsity of .* the last event of Cubic"):
        fit(Steady(), callback, max_epochs=-1, max_steps=2)
    assert callback.masks.sparsity < 0.5


# Saving.


def test_saved_weights_and_masks_agree_whatever_else_moves_weights(tmp_path):
    class Moves(Fusion):
        def on_train_epoch_end(self) -> None:
            with torch.no_grad():
                self.head.weight.add_(1.0)

    module, callback = Moves(), pruner(schedule=OneShot(0), sparsity=0.8)
    fit(module, callback, checkpoints(tmp_path), max_epochs=1, enable_checkpointing=True)
    assert not callback.masks["head.weight"].all()
    weights = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)["state_dict"]
    assert sum(int((weights[name] == 0).sum()) for name in PRUNABLE) == 96


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_other_stages_of_a_pruned_checkpoint(folder, stage):
    module, callback = Steady(), pruner()
    run = getattr(trainer(callback), stage)
    assert run(module, loader(seed=1), ckpt_path=at(folder, 3), verbose=False)[0]["val_loss"] > 0
    assert num_zeros(module) == 60
    assert callback.report().sparsity == 0.5
    assert len(callback.events) == 3
