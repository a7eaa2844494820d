"""Bad input: an early error that names the value, what is allowed and what to do; nothing is changed."""

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from altermoma_pl import AlterEva, AlterMOMACallback, Cubic, Linear, OneShot
from tests.helpers.lightning_models import (
    MODALITIES,
    Fusion,
    Manual,
    assert_same,
    fit,
    loader,
    num_zeros,
    pruner,
    short,
    trainer,
)


class Steps(Callback):
    """Counts training batches."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def refused(module: Any, message: str, callback: Any, error: Any = ValueError, **options: Any) -> None:
    """Fit raises before the first training step, with the message, and leaves the module as it was."""
    before, state, steps = copy.deepcopy(module.state_dict()), callback.state_dict(), Steps()
    gradients = [parameter.grad for parameter in module.parameters()]
    train = options.pop("train", None)
    val = options.pop("val", None)
    built = trainer(callback, steps, **options)
    with pytest.raises(error, match=re.escape(message)):
        built.fit(module, train or loader(), val or loader(seed=1))
    assert steps.count == 0
    assert_same(dict(module.state_dict()), dict(before))
    assert [parameter.grad for parameter in module.parameters()] == gradients
    assert callback.events == []
    assert callback.masks is None or callback.masks.sparsity == state_sparsity(state)
    assert not {"log", "log_dict"} & vars(module).keys()


def state_sparsity(state: dict[str, Any]) -> float:
    other = pruner()
    other.load_state_dict(state)
    return other.masks.sparsity if other.masks else 0.0


# Options of the constructor.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be a share of zeros in [0, 1), got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be a share of zeros in [0, 1), got -0.1"),
        ({"sparsity": 90}, "sparsity must be a share of zeros in [0, 1), got 90"),
        ({"sparsity": float("nan")}, "sparsity must be a share of zeros in [0, 1), got nan"),
        ({"sparsity": "0.5"}, "sparsity must be a share of zeros in [0, 1), got '0.5'"),
        ({"sparsity": False}, "sparsity must be a share of zeros in [0, 1), got False"),
        ({"scope": "channel"}, "scope must be one of ['global', 'modality', 'layer', 'row'], got 'channel'"),
        (
            {"loader": "test"},
            "loader must be one of ['auto', 'calibration', 'validation', 'training'], got 'test'",
        ),
        ({"min_density": 1.5}, "min_density must be in [0, 1], got 1.5"),
        (
            {"sparsity": {"camera": 0.5}},
            "one sparsity for each modality needs scope='modality', got 'global'",
        ),
        (
            {"sparsity": {"camera": 0.5, "lidar": 0.5, "radar": 0.5}, "scope": "modality"},
            "sparsity must name each of ['camera', 'lidar', 'shared']: unknown are ['radar'], missing are "
            "['shared']",
        ),
        (
            {"sparsity": {"camera": 0.5, "lidar": 1.5, "shared": 0.5}, "scope": "modality"},
            "sparsity of 'lidar' must be a share of zeros in [0, 1), got 1.5",
        ),
        ({"modalities": {"camera": ["camera"]}}, "at least two modalities are needed"),
        ({"modalities": {"camera": ["camera"], "shared": ["head"]}}, "modality name 'shared' is not allowed"),
        (
            {"modalities": {"camera": ["camera"], "lidar": ["!head"]}},
            "needs at least one pattern without '!'",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner(**options)


def test_patterns_must_be_strings():
    with pytest.raises(TypeError, match="modality 'camera': 3 is not a pattern over module paths"):
        pruner(modalities={"camera": [3], "lidar": ["lidar"]})


# The model.


class Twin(Fusion):
    """The head is also a part of the camera."""

    def __init__(self) -> None:
        super().__init__()
        self.camera.add_module("late", self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.camera[:4](x[:, :3]), self.lidar(x[:, 3:])], dim=1))


def frozen(*names: str) -> Fusion:
    module = Fusion()
    for name in names:
        getattr(module, name).requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            Fusion(),
            {"modalities": {"camera": ["cam"], "lidar": ["lidar"]}},
            "camera: pattern 'cam' matches no parameter of Fusion; did you mean 'camera",
        ),
        (
            Fusion(),
            {"modalities": {"camera": ["camera"], "lidar": ["lidar", "camera.3"]}},
            "parameter 'camera.3.weight' belongs to 2 modalities, 'camera' and 'lidar': exclude it",
        ),
        (
            Twin(),
            {"modalities": {"camera": ["camera"], "lidar": ["lidar", "head"]}},
            "belongs to 2 modalities",
        ),
        (Fusion(), {"prunable": ["heads"]}, "prunable: pattern 'heads' matches no parameter of Fusion"),
        (Fusion(), {"prunable": ["!*"]}, "nothing is prunable"),
        (frozen("camera"), {}, "modality 'camera' has nothing to prune: all of its"),
        (frozen("camera", "lidar", "head"), {}, "nothing is prunable"),
        (Fusion(), {"prunable": ["!lidar"]}, "modality 'lidar' has nothing to prune"),
    ],
    ids=["typo", "overlap", "alias", "prunable_typo", "prunable_none", "frozen", "all_frozen", "excluded"],
)
def test_the_model_does_not_fit(module, options, message):
    refused(module, message, pruner(**options))


# The Trainer.


@pytest.mark.parametrize("schedule", [OneShot(3), Linear(0, 3), Cubic(2, 9)])
def test_the_schedule_ends_after_the_run(schedule):
    message = (
        f"the last event of {schedule} is at epoch {schedule.last_epoch}, but max_epochs=3 ends with "
        f"epoch 2: let the schedule end earlier, or train for more epochs"
    )
    callback = pruner(schedule=schedule)
    refused(Fusion(), message, callback)
    assert callback.masks is None


def test_a_schedule_that_just_fits_is_fine():
    callback = pruner(schedule=OneShot(2))
    fit(Fusion(), callback)
    assert len(callback.events) == 1


def test_a_target_below_what_is_pruned():
    module, callback = Fusion(), pruner(schedule=OneShot(0))
    fit(module, callback)
    callback.sparsity, state = 0.3, callback.state_dict()
    before = copy.deepcopy(module.state_dict())
    message = (
        "sparsity 0.3 of the model is below what is already pruned, 0.5: masks only shrink, ask for more or "
        "start from a dense checkpoint"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(module, callback)
    assert_same(callback.state_dict(), state)
    assert_same(module.state_dict(), before)


def test_floors_that_make_the_target_unreachable():
    message = "sparsity 0.9 of the model keeps 12 of 120 weights, but min_density=0.5 protects 60: lower one"
    refused(Fusion(), message, pruner(sparsity=0.9, min_density=0.5, schedule=OneShot(0)))


def test_floors_are_checked_against_the_final_target_before_the_first_step():
    callback = pruner(sparsity=0.9, min_density=0.5, schedule=Linear(0, 2))
    refused(Fusion(), "min_density=0.5 protects 60: lower one of them", callback)


def test_a_second_callback_of_the_class_is_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AlterMOMACallback`"):
        trainer(pruner(), pruner(sparsity=0.1))


# The loss.


class Returns(Fusion):
    """Makes something else of its loss."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.change(self.loss(batch), batch_idx)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda loss, _: None,
            "training_step returned no loss but NoneType: to score weights it must return a",
        ),
        (lambda loss, _: {"losses": loss}, "training_step returned no loss but dict"),
        (lambda loss, _: {"loss": None}, "training_step returned no loss but NoneType"),
        (lambda loss, _: loss.item(), "training_step returned no loss but float"),
        (lambda loss, _: [loss], "training_step returned no loss but list"),
        (lambda loss, _: loss.detach(), "the loss of training batch 0 has no gradient: it is detached"),
        (lambda loss, _: loss.expand(2), "the loss of probe batch 0 must be a scalar, got shape (2,)"),
        (lambda loss, _: loss * float("nan"), "the loss of probe batch 0 is nan: check the batch"),
        (lambda loss, i: loss / (i != 1), "the loss of probe batch 1 is inf: check the batch"),
        (lambda loss, i: None if i == 1 else loss, "training_step returned no loss but NoneType"),
    ],
    ids=[
        "none",
        "dict",
        "dict_none",
        "float",
        "list",
        "detached",
        "vector",
        "nan",
        "inf_later",
        "none_later",
    ],
)
def test_the_loss_is_no_loss(change, message):
    refused(Returns(change), message, pruner(schedule=OneShot(0)))


def test_a_gradient_that_is_not_finite_names_tensor_and_batch():
    def bad(loss: torch.Tensor, index: int) -> torch.Tensor:
        return loss + (module.head.weight * 0).sqrt().sum() * (index == 1)

    module = Returns(bad)
    refused(
        module, "the gradient of 'head.weight' on training batch 0 is not finite", pruner(schedule=OneShot(0))
    )


def test_manual_optimization_without_pruning_loss():
    class NoLoss(Manual):
        pruning_loss = property()  # hasattr is False

    message = (
        "NoLoss uses manual optimization, so its training_step changes weights and cannot be used to score "
        "them: define `pruning_loss(self, batch, batch_idx)` that returns the loss as a scalar tensor"
    )
    refused(NoLoss(), message, pruner())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_over_an_iterator():
    class Iterates(Fusion):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    refused(Iterates(), "training_step of Iterates takes an iterator over batches: define", pruner())


def test_a_loss_that_leaves_a_modality_out():
    class Blind(Fusion):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.cat([self.camera(x[:, :3]), x[:, :4]], dim=1))

    message = "DeCI of the group 'lidar' is 0: the loss depends on none of its weights"
    refused(Blind(), message, pruner(schedule=OneShot(0)))


# The loaders.


def test_no_held_out_loader():
    message = (
        "there is no held-out loader to score weights with (limit_val_batches=0): give the Trainer a "
        "validation loader and a validation_step, define `calibration_dataloader()` on the datamodule or the "
        "LightningModule, or choose loader='training'"
    )
    refused(Fusion(), message, pruner(), limit_val_batches=0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_no_validation_loader_at_all():
    callback, built = pruner(), DataLoader.__init__
    with pytest.raises(ValueError, match="there is no held-out loader to score weights with"):
        trainer(callback).fit(Fusion(), loader())
    assert callback.events == []
    assert DataLoader.__init__ is built  # patched while Lightning loads: an error there would leave it so


def test_no_calibration_loader():
    message = "loader='calibration' needs a method `calibration_dataloader()` on the datamodule or the"
    refused(Fusion(), message, pruner(loader="calibration"))


def test_an_empty_loader():
    class Empty(Fusion):
        def calibration_dataloader(self) -> Any:
            return []

    message = (
        "the held-out loader is empty, at least one batch is needed to score weights: check its data set"
    )
    refused(Empty(), message, pruner(schedule=OneShot(0)))


def test_fresh_probes_that_the_loader_does_not_have():
    class Single(Fusion):
        def calibration_dataloader(self) -> Any:
            return loader(8)

    message = "the probe loader gives no batch after the first 1: at least one is needed"
    criterion = replace(AlterEva.paper(), num_reactivation_steps=2)
    refused(Single(), message, pruner(schedule=OneShot(0), criterion=criterion))


def test_a_short_loader_warns_and_uses_what_there_is():
    callback = pruner(criterion=short(num_probe_batches=9))
    module = Fusion()
    with pytest.warns(
        UserWarning, match="9 probe batches were asked for, the loader has 4: scoring with those"
    ):
        fit(module, callback)
    assert callback.masks.num_kept == 60


def test_a_short_training_loader_warns():
    callback = pruner(criterion=short(num_reactivation_steps=7))
    with pytest.warns(UserWarning, match="7 training batches were asked for, the loader has 4"):
        fit(Fusion(), callback)
    assert callback.masks.num_kept == 60


# The hooks out of order.


def test_a_subclass_that_forgets_the_start_of_fit_prunes_all_the_same():
    class Early(AlterMOMACallback):
        def on_fit_start(self, *_: Any) -> None:
            """Forgets to call its parent."""

    module = Fusion()
    callback = Early(MODALITIES, 0.5, schedule=OneShot(0), criterion=short(), figures=False)
    fit(module, callback)
    assert num_zeros(module) == 60


def test_lazy_layers_without_shapes():
    class Lazy(Fusion):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(1)

    callback = pruner()
    with pytest.raises(ValueError, match="has no shape yet: run one batch through the lazy layers"):
        fit(Lazy(), callback)
    assert callback.masks is None


def test_hooks_without_on_fit_start():
    with pytest.raises(RuntimeError, match="on_fit_start of this fit did not run"):
        pruner(schedule=OneShot(0)).on_train_epoch_start(trainer(), Fusion())
