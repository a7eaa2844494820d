"""One run in every regime of Lightning: zeros exact, masks as expected, metrics logged, checkpoints plain.

Regimes with several processes are in files of their own.
"""

import copy
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from altermoma_pl import AlterMOMACallback, Linear, Magnitude, Masks, OneShot, Rewinding
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.callback.state import PruningState
from altermoma_pl.cli import main
from tests.helpers.lightning_models import (
    MODALITIES,
    Fusion,
    Manual,
    assert_same,
    fit,
    loader,
    nonzero_pruned,
    num_zeros,
    pruner,
    short,
    trainer,
)
from tests.helpers.resuming import KEY, Steady

NUM_PRUNED = 96  # 0.8 of 120
SCHEDULE = Linear(0, 2)  # 32, 64 and 96 zeros from epochs 0, 1 and 2 on
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*WeightAveraging callback.*"),
    pytest.mark.filterwarnings("ignore:.*No available `configure_model`"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint"),
]


def pruning(**options: Any) -> AlterMOMACallback:
    """Three events; by magnitude where scoring is not what a test is about."""
    return pruner(**{"sparsity": 0.8, "schedule": SCHEDULE, "criterion": Magnitude(), **options})


class Memory(Logger):
    """Keeps what is logged."""

    name, version, experiment = "memory", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing is asked of them."""


class Witness(Callback):
    """Sees weights and clipped gradients right after each step, and weights in each validation."""

    def __init__(self, pruning: AlterMOMACallback) -> None:
        self.pruning = pruning
        self.steps = self.violations = 0
        self.validated: list[int] = []
        self.norms: list[float] = []  # of kept gradients, in each step of each optimizer
        self.largest: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda o, *_: self._look(pl_module, o))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(nonzero_pruned(pl_module, self.pruning.masks))

    def _look(self, module: Any, optimizer: Any) -> None:
        self.steps += 1
        self.violations += nonzero_pruned(module, self.pruning.masks)
        masks = {id(module.get_parameter(name)): mask for name, mask in self.pruning.masks.items()}
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not moved:  # the epoch in which SWA measures running statistics
            return
        kept = torch.cat([p.grad[masks[id(p)]] if id(p) in masks else p.grad.flatten() for p in moved])
        self.norms.append(float(kept.norm()))
        self.largest.append(float(kept.abs().max()))


def assert_pruned(module: nn.Module, masks: Masks, count: int) -> None:
    """As many zeros as asked for, exactly where the masks say."""
    weights = dict(module.named_parameters())
    assert masks.num_weights - masks.num_kept == count
    assert sum(int((weights[name] == 0).sum()) for name in masks) == count
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())


def assert_plain(path: Path, plain: nn.Module, count: int | None = None) -> None:
    """A checkpoint loads in a model that knows nothing of pruning, with the zeros of its masks."""
    checkpoint = torch.load(path, weights_only=True)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    if "callbacks" in checkpoint:
        masks = PruningState.from_state_dict(checkpoint["callbacks"][KEY]).masks
        assert_pruned(plain, masks, masks.num_weights - masks.num_kept if count is None else count)


# Modules.


class ManualAccumulation(Manual):
    """Two optimizers that step after every second batch, with gradients clipped by hand."""

    clip: tuple[float, str] | None = None
    every = 2

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                if self.clip is not None:
                    self.clip_gradients(optimizer, *self.clip)
                optimizer.step()
                optimizer.zero_grad()


class ManualNorm(ManualAccumulation):
    clip, every = (1e-3, "norm"), 1


class ManualValue(ManualAccumulation):
    clip, every = (1e-4, "value"), 1


class ManualAccumulatedNorm(ManualAccumulation):
    clip = (1e-3, "norm")


class OwnClipping(Fusion):
    """Clips in a hook of its own."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


class ConfiguredClipping(Fusion):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 1e-3, "norm")


class Overflowing(Fusion):
    """The gradients of one batch are infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.current_epoch == 3 and batch_idx == 1 else loss


class Images(Fusion):
    """Convolutions in the memory format of channels last."""

    def __init__(self) -> None:
        super().__init__()

        def branch() -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

        self.camera, self.lidar, self.head = branch(), branch(), nn.Conv2d(4, 1, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=torch.channels_last)
        fused = torch.cat([self.camera(x[:, :3]), self.lidar(x[:, 3:])], dim=1)
        return self.head(fused).mean((1, 2, 3))[:, None]


def images(seed: int = 0) -> DataLoader[Any]:
    x = torch.randn(16, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.mean((1, 2, 3))[:, None]), 8)


class Scheduled(Fusion):
    """A learning-rate schedule, as StochasticWeightAveraging exchanges it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


# Averaging callbacks.


class LateAverage(EMAWeightAveraging):
    """Starts after all events: until then it holds, shows and saves its copy of the dense start."""

    def __init__(self) -> None:
        super().__init__(decay=0.5, update_starting_at_step=13)


class OwnAverage(Callback):
    """An average as other projects keep it: a frozen module or a dictionary, saved in the weights' place."""

    def __init__(self, as_module: bool) -> None:
        self.as_module = as_module
        self.average: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        copied = copy.deepcopy(pl_module).requires_grad_(False)
        self.average = copied if self.as_module else dict(copied.state_dict())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.named_parameters():
            self._tensors[name].lerp_(value.detach(), 0.1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value.clone() for name, value in self._tensors.items()}

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.average.state_dict() if self.as_module else self.average


class HiddenAverage(Callback):
    """An average that cannot be found: it is exchanged with the weights, and left in them at the end."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for value, own in zip(pl_module.parameters(), self.average, strict=True):
            own.lerp_(value.detach(), 0.1)

    def exchange(self, trainer: Any, pl_module: Any) -> None:
        for value, own in zip(pl_module.parameters(), self.average, strict=True):
            value.data, own.data = own.clone(), value.data.clone()

    on_validation_epoch_start = on_validation_epoch_end = on_train_end = exchange


# The matrix.


@dataclass(frozen=True)
class Regime:
    module: Callable[[], Any] = Fusion
    steps: int = 16  # of optimizers, in 4 epochs of 4 batches
    options: dict[str, Any] = field(default_factory=dict)
    others: Callable[[], list[Callback]] = list
    data: Callable[..., Any] = loader
    pruned: int = NUM_PRUNED
    clipped: dict[str, float] = field(default_factory=dict)


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))


REGIMES = {
    "automatic": Regime(),
    "automatic_sgd": Regime(lambda: Fusion("sgd")),
    "manual_with_two_optimizers": Regime(Manual, 32),
    "manual_with_accumulation": Regime(ManualAccumulation, 16),
    "accumulation": Regime(steps=8, options={"accumulate_grad_batches": 2}),
    "clipping_by_norm": Regime(options={"gradient_clip_val": 1e-3}, clipped={"norm": 1e-3}),
    "clipping_by_value": Regime(
        options={"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}, clipped={"value": 1e-4}
    ),
    "clipping_with_accumulation": Regime(
        steps=8, options={"gradient_clip_val": 1e-3, "accumulate_grad_batches": 2}, clipped={"norm": 1e-3}
    ),
    "clipping_by_a_hook": Regime(OwnClipping, clipped={"norm": 1e-3}),
    "clipping_as_configured": Regime(ConfiguredClipping, clipped={"norm": 1e-3}),
    "manual_clipping_by_norm": Regime(ManualNorm, 32, clipped={"norm": 1e-3}),
    "manual_clipping_by_value": Regime(ManualValue, 32, clipped={"value": 1e-4}),
    "manual_clipping_with_accumulation": Regime(ManualAccumulatedNorm, 16, clipped={"norm": 1e-3}),
    "bf16_mixed": Regime(options={"precision": "bf16-mixed"}),
    "bf16_true": Regime(options={"precision": "bf16-true"}),
    "fp16_with_grad_scaler": Regime(options={"plugins": fp16}),
    "fp16_with_a_skipped_step": Regime(Overflowing, 15, options={"plugins": fp16}),
    "fp16_with_clipping": Regime(
        options={"plugins": fp16, "gradient_clip_val": 1e-3}, clipped={"norm": 1e-3}
    ),
    "fp16_on_a_gpu": Regime(options={"precision": "16-mixed", "accelerator": "gpu"}),
    "channels_last": Regime(Images, 8, data=images, pruned=291),  # 0.8 of 364
    "ema": Regime(others=lambda: [EMAWeightAveraging(decay=0.9)]),
    "ema_on_another_device": Regime(others=lambda: [EMAWeightAveraging(device="cpu", decay=0.9)]),
    "ema_that_starts_late": Regime(others=lambda: [LateAverage()]),
    "weight_averaging": Regime(others=lambda: [WeightAveraging()]),
    "swa": Regime(Scheduled, 17, others=lambda: [StochasticWeightAveraging(0.05, 1)]),
    "swa_that_starts_last": Regime(Scheduled, 17, others=lambda: [StochasticWeightAveraging(0.05, 4)]),
    "average_in_a_module": Regime(others=lambda: [OwnAverage(as_module=True)]),
    "average_in_a_dictionary": Regime(others=lambda: [OwnAverage(as_module=False)]),
    "average_in_hiding": Regime(others=lambda: [HiddenAverage()]),
    "early_stopping": Regime(others=lambda: [EarlyStopping("train_loss", patience=9)]),
}  # fmt: skip


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def matrix() -> Iterator[Any]:
    for name, spec in REGIMES.items():
        yield pytest.param(spec, "first", id=name, marks=NEEDS_GPU if "gpu" in name else ())
        if spec.others():
            yield pytest.param(spec, "last", id=f"{name}_before_pruning")


@pytest.mark.parametrize(("spec", "place"), list(matrix()))
def test_zeros_are_exact_with(spec, place, tmp_path):
    callback, memory = pruning(criterion=short()), Memory()
    witness, saved = Witness(callback), ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True)
    order = [callback, *spec.others()] if place == "first" else [*spec.others(), callback]
    options = {key: [value()] if key == "plugins" else value for key, value in spec.options.items()}
    module = spec.module()
    layout = {name: p.stride() for name, p in module.named_parameters()}
    fit(
        module, *order, witness, saved, train=spec.data(), val=spec.data(seed=1), max_epochs=4,
        enable_checkpointing=True, logger=memory, log_every_n_steps=1, **options,
    )  # fmt: skip

    assert [event["epoch"] for event in callback.events] == [0, 1, 2]
    assert_pruned(module, callback.masks, spec.pruned)
    assert (witness.steps, witness.violations) == (spec.steps, 0)
    assert set(witness.validated) == {0}
    assert {name: p.stride() for name, p in module.named_parameters()} == layout
    assert len(memory.metrics["pruning/sparsity"]) == 3
    assert memory.metrics["pruning/sparsity"][-1] == pytest.approx(spec.pruned / callback.masks.num_weights)
    assert torch.isfinite(torch.tensor([v for values in memory.metrics.values() for v in values])).all()
    # Kept weights have all of the norm that clipping leaves; a branch that was cut off has none.
    if "norm" in spec.clipped:
        alive = [norm for norm in witness.norms if norm > 0]
        assert len(alive) >= len(witness.norms) / 2
        assert alive == pytest.approx([spec.clipped["norm"]] * len(alive), rel=1e-3)
    if "value" in spec.clipped:
        assert max(witness.largest) == pytest.approx(spec.clipped["value"])
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 5
    for path in paths:
        assert_plain(path, spec.module().to(next(module.parameters()).dtype))
    assert_plain(tmp_path / "last.ckpt", spec.module(), spec.pruned)


# Averages.


class Statistics(Callback):
    """Counts nonzero pruned weights in all that an averaging callback adds to a checkpoint."""

    def __init__(self, pruning: AlterMOMACallback) -> None:
        self.pruning = pruning
        self.found: dict[str, set[int]] = {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        states = {"saved": checkpoint["state_dict"], "current": checkpoint.get("current_model_state")}
        for key, state in checkpoint["callbacks"].items():
            states[key] = state.get("average_model_state")
        for name, state in states.items():
            if state is not None:
                wrong = sum(int(state[n][~m].count_nonzero()) for n, m in self.pruning.masks.items())
                self.found.setdefault(name, set()).add(wrong)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: EMAWeightAveraging(decay=0.9), {"saved", "current"}),
        (lambda: StochasticWeightAveraging(0.05, 1), {"saved", "StochasticWeightAveraging"}),
    ],
    ids=["ema", "swa"],
)
def test_all_that_averages_save_has_the_zeros(make, keys, tmp_path):
    callback = pruning()
    found = Statistics(callback)
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(Scheduled(), make(), found, callback, saved, max_epochs=4, enable_checkpointing=True)
    assert found.found == {key: {0} for key in keys}


def test_averages_differ_from_weights_and_go_on_after_a_resume(tmp_path):
    def run(**options: Any) -> tuple[Any, Any, Any]:
        module, callback, average = Steady(), pruning(), EMAWeightAveraging(decay=0.9)
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        built = trainer(average, callback, saved, max_epochs=4, enable_checkpointing=True)
        torch.manual_seed(3)
        built.fit(module, loader(), loader(seed=1), **options)
        return module, callback, built

    module, callback, _ = run()
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert not torch.equal(averaged["head.weight"], current["head.weight"])
    assert torch.equal(averaged["head.weight"], module.head.weight)
    for epoch in range(3):
        again, other, _ = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(again.state_dict(), module.state_dict())
        assert other.masks == callback.masks


def test_the_last_epoch_of_swa_measures_the_statistics_of_pruned_weights():
    module, callback = Scheduled(), pruning()
    fit(module, callback, StochasticWeightAveraging(0.05, 1), max_epochs=4)
    x = torch.cat([batch[0] for batch in loader()])[:, :3]
    seen = module.camera[0](x)
    assert module.camera[1].running_mean == pytest.approx(seen.mean(0).detach(), abs=1e-5)
    assert num_zeros(module) == NUM_PRUNED


def test_what_an_earlier_callback_puts_in_the_place_of_the_weights_is_masked(tmp_path):
    class Replaces(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {n: torch.ones_like(t) for n, t in checkpoint["state_dict"].items()}

    saved = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(Fusion(), Replaces(), pruning(), saved, enable_checkpointing=True)
    for path in tmp_path.iterdir():
        assert_plain(path, Fusion())


def test_what_is_left_in_the_module_when_training_ends_is_masked():
    class Leaves(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.head.weight.data.fill_(1.0)

    module, callback = Fusion(), pruning()
    fit(module, callback, Leaves())
    assert_pruned(module, callback.masks, NUM_PRUNED)


def test_a_teacher_inside_the_module_is_left_alone(tmp_path):
    class Taught(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = Fusion(), Fusion().requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net.loss(batch) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1)

    module, average = Taught(), EMAWeightAveraging(decay=0.9)
    callback = pruning(modalities={m: [f"net.{m}"] for m in MODALITIES})
    fit(module, callback, average, ModelCheckpoint(tmp_path, "taught"), enable_checkpointing=True)
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert_plain(tmp_path / "taught.ckpt", Taught(), NUM_PRUNED)
    saved = torch.load(tmp_path / "taught.ckpt", weights_only=True)
    for state in (saved["state_dict"], saved["current_model_state"], module.state_dict()):
        assert all(torch.allclose(state[f"teacher.{n}"], p) for n, p in Fusion().named_parameters())


def test_averages_of_one_submodule_are_masked():
    class Wrapped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Fusion()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net.loss(batch)

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class OfNet(Callback):
        average = unrelated = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.average = torch.optim.swa_utils.AveragedModel(pl_module.net)
            self.unrelated = nn.Linear(8, 1)

    callback, average = pruning(modalities={m: [f"net.{m}"] for m in MODALITIES}), OfNet()
    fit(Wrapped(), callback, average)
    assert_pruned(average.average.module, Masks({n[4:]: m for n, m in callback.masks.items()}), NUM_PRUNED)
    assert average.unrelated.weight.count_nonzero() == 8


# Checkpoints.


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss", "save_top_k": 2},
        {"monitor": "train_loss_epoch", "mode": "max", "save_top_k": 1},
        {"save_last": True, "save_top_k": 0},
        {"save_last": "link", "save_top_k": -1},
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"every_n_epochs": 2, "save_top_k": -1},
        {"train_time_interval": timedelta(microseconds=1), "save_top_k": -1},
        {"save_weights_only": True, "save_top_k": -1},
        {"save_on_train_epoch_end": True, "save_top_k": -1},
        {"save_on_train_epoch_end": False, "save_top_k": -1},
    ],
    ids=lambda options: "-".join(options),
)
def test_model_checkpoint(options, tmp_path):
    module, callback = Fusion(), pruning()
    saved = ModelCheckpoint(tmp_path, **options)
    fit(module, callback, saved, max_epochs=4, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert paths
    for path in paths:
        plain = Fusion()
        assert_plain(path, plain)
        # Without masks beside them the weights still have the zeros of one of the events.
        assert num_zeros(plain) in (32, 64, 96)
    assert_pruned(module, callback.masks, NUM_PRUNED)


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"])
def test_model_checkpoint_on_exception(where, tmp_path):
    class Fails(Callback):
        def fail(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("the user's own")

    fails = Fails()
    setattr(fails, where, fails.fail)
    module, callback = Fusion(), pruning()
    saved = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=-1)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(
            module, EMAWeightAveraging(decay=0.9), fails, callback, saved, max_epochs=4,
            enable_checkpointing=True,
        )  # fmt: skip
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        assert_plain(path, Fusion())
    assert_pruned(module, callback.masks, 64)


def test_early_stopping_after_the_last_event(tmp_path):
    module, callback = Fusion(), pruning()
    ran = fit(module, callback, EarlyStopping("train_loss_epoch", patience=3, mode="max"), max_epochs=20)
    assert 3 <= ran.current_epoch < 20
    assert_pruned(module, callback.masks, NUM_PRUNED)


def test_early_stopping_before_the_last_event_says_so():
    module, callback = Fusion(), pruning(schedule=Linear(0, 8))
    stopper = EarlyStopping("train_loss_epoch", patience=1, mode="max")
    with pytest.warns(UserWarning, match="training ended at a sparsity of"):
        fit(module, callback, stopper, max_epochs=20)
    assert_pruned(module, callback.masks, num_zeros(module))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_of_a_pruned_checkpoint(stage, tmp_path):
    saved = ModelCheckpoint(tmp_path, "pruned")
    fit(Fusion(), pruning(), saved, enable_checkpointing=True)
    module, callback, memory = Fusion(), pruning(), Memory()
    built = trainer(callback, logger=memory)
    getattr(built, stage)(
        module, predicting() if stage == "predict" else loader(), ckpt_path=tmp_path / "pruned.ckpt"
    )
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert len(callback.events) == 3
    assert not any(name.startswith("pruning") for name in memory.metrics)
    module.head.weight.data.fill_(1.0)  # after the stage nothing is held
    assert num_zeros(module) < NUM_PRUNED


def predicting() -> DataLoader[Any]:
    return DataLoader(loader().dataset.tensors[0], 8)


# One callback and several fits, copies, pickles.


def test_several_fits_with_one_callback():
    module, callback = Fusion(), pruning()
    for epochs in (3, 2, 2):
        witness = Witness(callback)
        fit(module, callback, witness, max_epochs=max(epochs, 3))
        assert witness.violations == 0
        assert_pruned(module, callback.masks, NUM_PRUNED)
    assert len(callback.events) == 3
    assert not hooks_of(module, callback)


def hooks_of(module: Any, callback: AlterMOMACallback) -> bool:
    return callback._held.enforcement is not None or bool(vars(module).get("_forward_pre_hooks"))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda callback: pickle.loads(pickle.dumps(callback))}


@pytest.mark.parametrize("how", COPIES)
def test_copies_before_and_after_fit(how):
    original = pruning()
    copied = COPIES[how](original)
    module, other = Fusion(), Fusion()
    fit(module, original)
    fit(other, copied)
    assert original.masks == copied.masks
    assert_same(other.state_dict(), module.state_dict())
    again = COPIES[how](original)
    assert_same(again.state_dict(), original.state_dict())
    fit(module, again)  # goes on with the pruned model
    assert_pruned(module, again.masks, NUM_PRUNED)
    assert len(again.events) == len(original.events) == 3


@pytest.mark.parametrize("how", COPIES)
def test_copies_during_fit_hold_nothing_of_the_run(how):
    class Copies(Callback):
        taken: Any = None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.taken = COPIES[how](callback), copy.deepcopy(pl_module)

    callback, copies = pruning(), Copies()
    fit(Fusion(), callback, copies)
    taken, module = copies.taken
    assert taken._held.enforcement is None
    assert_pruned(module, taken.masks, 64)
    assert len(taken.events) == 2
    module.head.weight.data.fill_(1.0)
    with pytest.raises(ValueError, match="is not zero where the masks"):
        fit(module, taken)
    assert taken._held.enforcement is None


def test_the_learning_rate_finder_leaves_the_run_and_its_zeros(tmp_path):
    module, callback = Fusion(), pruning()
    witness = Witness(callback)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(module, callback, finder, witness, default_root_dir=tmp_path)
    assert (witness.steps, witness.violations) == (12, 0)
    assert_pruned(module, callback.masks, NUM_PRUNED)


def test_optimizers_exchanged_during_training_are_followed():
    class Exchanges(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), 0.1, momentum=0.9)]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(nonzero_pruned(pl_module, callback.masks))

    seen: list[int] = []
    module, callback = Fusion("sgd"), pruning(schedule=OneShot(0))
    fit(module, Exchanges(), callback, max_epochs=4)
    assert seen == [0] * 16
    assert_pruned(module, callback.masks, NUM_PRUNED)


# Two callbacks in one Trainer.

EARLY = ["!camera.3.weight", "!lidar.3.weight", "!head.weight"]
LATE = ["!camera.0.weight", "!lidar.0.weight", "!head.weight"]


def both(**options: Any) -> tuple[AlterMOMACallback, AlterMOMACallback]:
    """One prunes 36 of 48 weights, the other 32 of 64."""
    options = {"criterion": Magnitude(), "scope": "layer", **options}
    first = pruner(name="early", prunable=EARLY, sparsity=0.75, schedule=OneShot(0), **options)
    return first, pruner(name="late", prunable=LATE, sparsity=0.5, schedule=OneShot(1), **options)


def test_two_callbacks_prune_different_weights(tmp_path, capsys):
    module, memory, (early, late) = Fusion(), Memory(), both()
    saved = ModelCheckpoint(tmp_path, save_top_k=-1)
    watches = Witness(early), Witness(late)
    fit(module, early, late, *watches, saved, logger=memory, enable_checkpointing=True)
    assert [watch.violations for watch in watches] == [0, 0]
    assert_pruned(module, early.masks, 36)
    assert_pruned(module, late.masks, 32)
    assert memory.metrics["pruning/early/sparsity"] == [0.75]
    assert memory.metrics["pruning/late/sparsity"] == [0.5]
    assert "pruning/sparsity" not in memory.metrics
    out = capsys.readouterr().out
    assert "early: Pruned before epoch 0" in out
    assert "late: Pruned before epoch 1" in out
    path = sorted(tmp_path.glob("*.ckpt"))[-1]
    states = pruning_states_of(load_checkpoint(str(path)), str(path))
    assert {name: state.report().sparsity for name, state in states.items()} == {"early": 0.75, "late": 0.5}
    again, others = Fusion(), both()
    trainer(*others, max_epochs=4).fit(again, loader(), loader(seed=1), ckpt_path=path)
    assert [each.masks for each in others] == [early.masks, late.masks]


def test_the_report_of_two_callbacks_has_all_states(tmp_path, capsys):
    fit(Fusion(), *both(), ModelCheckpoint(tmp_path, "two"), enable_checkpointing=True)
    outputs = {}
    for kind in ("table", "json", "csv"):
        capsys.readouterr()
        main(["report", str(tmp_path / "two.ckpt"), "--format", kind, "--figures", str(tmp_path / "figures")])
        outputs[kind] = capsys.readouterr().out
    assert "early: kept weights: sparsity 0.7500" in outputs["table"]
    assert "late: kept weights: sparsity 0.5000" in outputs["table"]
    assert outputs["json"].index('"early"') < outputs["json"].index('"late"')
    assert outputs["csv"].count("group") == 1
    assert len(outputs["csv"].splitlines()) == 5
    assert (tmp_path / "figures" / "late" / "kept_per_layer.png").exists()


def test_rewinding_of_one_keeps_the_zeros_of_the_other():
    class Zeros(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(num_zeros(pl_module, early.masks))

    early, late = both()
    early.schedule = OneShot(1)
    late.schedule = Rewinding(rounds=2, epochs_per_round=1, rewind_epoch=0)
    zeros = Zeros()
    fit(Fusion(), early, late, zeros, max_epochs=4)
    assert zeros.seen == [0, 36, 36, 36]


@pytest.mark.parametrize("order", ["first", "last"])
def test_two_callbacks_that_share_weights_are_refused(order):
    callbacks = [pruner(name="a"), pruner(name="b", prunable=EARLY)]
    module = Fusion()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError,
        match=r"the callbacks '[ab]' and '[ab]' both prune \['camera.0.weight', .*give them disjoint",
    ):
        fit(module, *(callbacks if order == "first" else reversed(callbacks)))
    assert_same(module.state_dict(), before)


@pytest.mark.parametrize("name", ["", "a/b", "a b", 3])
def test_names_must_fit_into_paths(name):
    with pytest.raises(ValueError, match=r"name must be None, or made of letters, digits, '_' and '-', got "):
        pruner(name=name)


def test_the_key_in_checkpoints():
    assert [pruner().state_key, pruner(name="a").state_key] == [KEY, f"{KEY}[a]"]


def test_figures_of_a_named_callback_go_to_a_folder_of_its_own(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit(Fusion(), *both(figures=True), logger=CSVLogger(tmp_path, "", ""))
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("kept_per_layer.png")}
    assert found == {"pruning/early", "pruning/late"}


# Never a state that disagrees.


class Interrupts(Callback):
    """Raises `KeyboardInterrupt` at the given line of `_prune`, counted in order of execution, at epoch 1."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.reached = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            sys.settrace(self._call)

    def _call(self, frame: Any, event: str, _: Any) -> Any:
        return self._count if frame.f_code.co_name == "_prune" else None

    def _count(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            self.line -= 1
        if self.line < 0:
            sys.settrace(None)
            self.reached = True
            raise KeyboardInterrupt
        return self._count

    def on_exception(self, *_: Any) -> None:
        sys.settrace(None)

    def on_train_batch_start(self, *_: Any) -> None:
        sys.settrace(None)


@pytest.mark.parametrize(
    "schedule", [Linear(0, 1), Rewinding(rounds=2, epochs_per_round=1)], ids=["going_on", "rewinding"]
)
def test_an_interrupt_at_any_line_of_an_event_leaves_masks_and_weights_that_agree(schedule, tmp_path):
    seen = set()
    for line in range(40):
        callback, module = pruning(schedule=schedule), Fusion()
        interrupts = Interrupts(line)
        saved = ModelCheckpoint(tmp_path / str(line), save_on_exception=True, save_top_k=0, save_last=True)
        before = sys.gettrace()
        try:
            fit(module, interrupts, EMAWeightAveraging(decay=0.9), callback, saved, enable_checkpointing=True)
        except SystemExit:
            path = next((tmp_path / str(line)).glob("*.ckpt"))
            assert_plain(path, Fusion())
            assert_plain(path, module)
            assert callback.events[-1]["sparsity"] == callback.masks.sparsity
            seen.add(len(callback.events))
        finally:
            sys.settrace(before)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not interrupts.reached:
            break
    assert line > 10
    assert seen == {1, 2}


def test_an_interrupted_step_is_undone_where_weights_are_pruned(tmp_path):
    class HalfAStep(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            if trainer_of[0].current_epoch == 2:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
                raise KeyboardInterrupt
            return result

    class Interrupted(Fusion):
        def configure_optimizers(self) -> Any:
            trainer_of.append(self.trainer)
            return HalfAStep(self.parameters(), 0.02, momentum=0.9)

    trainer_of: list[Any] = []
    callback, module = pruning(), Interrupted()
    saved = ModelCheckpoint(tmp_path, "stopped", save_on_exception=True, save_top_k=0)
    with pytest.raises(SystemExit):
        fit(module, callback, saved, enable_checkpointing=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert_plain(tmp_path / "stopped.ckpt", Fusion(), NUM_PRUNED)


# torch.compile.


class Branch(nn.Sequential):
    """Layers with a `forward` that is not torch's own, which torch.compile would pass over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
        return x


class Compiled(Fusion):
    """Compiled branches: `fullgraph` raises at a break of the graph."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.camera, self.lidar = Branch(*self.camera), Branch(*self.lidar)
        self.camera.compile(backend=backend, fullgraph=True)
        self.lidar.compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled_modules_are_not_compiled_again_by_a_mask_change(inner, tmp_path):
    class Counts(Callback):
        """How many graphs there are before and after each epoch, events included or not."""

        def __init__(self) -> None:
            self.before: list[int] = []
            self.after: list[int] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.before.append(len(graphs))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.after.append(len(graphs))

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(inner)(graph, inputs)

    torch._dynamo.reset()
    callback, counts, module = pruning(schedule=Linear(1, 3), criterion=short()), Counts(), Compiled(backend)
    witness = Witness(callback)
    saved = ModelCheckpoint(tmp_path, "compiled")
    fit(module, callback, counts, witness, saved, max_epochs=5, enable_checkpointing=True)
    # Training and validation; scoring may need graphs of its own, once.
    assert counts.after[0] == 4
    assert counts.before[2:] == [counts.before[1]] * 3
    assert counts.after[1:] == counts.before[1:]
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert (witness.steps, witness.violations) == (20, 0)
    assert_plain(tmp_path / "compiled.ckpt", Fusion(), NUM_PRUNED)


def test_a_module_compiled_as_a_whole(tmp_path):
    """As Lightning supports it; names in patterns, masks and checkpoints are those of the plain module."""

    class Silent(Fusion):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)  # `self.log` cannot be traced

    module, callback = Silent(), pruning(criterion=short())
    saved = ModelCheckpoint(tmp_path, "compiled")
    fit(torch.compile(module, backend="eager"), callback, saved, enable_checkpointing=True)
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert_plain(tmp_path / "compiled.ckpt", Fusion(), NUM_PRUNED)


def test_compiled_submodules_in_their_wrappers():
    class Wrapped(Fusion):
        def __init__(self) -> None:
            super().__init__()
            self.camera = torch.compile(self.camera, backend="eager")

    module, callback = Wrapped(), pruning(criterion=short())
    fit(module, callback)
    assert "camera._orig_mod.0.weight" in callback.masks
    assert_pruned(module, callback.masks, NUM_PRUNED)


# Both names under which Lightning is installed.


class OldName(pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Fusion()

    def training_step(self, batch: Any) -> Any:
        loss = self.net.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 0.02)


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["plain", "clipped"])
def test_pytorch_lightning(clip, tmp_path):
    modalities = {"camera": ["net.camera"], "lidar": ["net.lidar"]}
    callback = pruning(modalities=modalities, loader="training", criterion=short())
    witness = Witness(callback)
    average = pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.9)
    saved = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, "old")
    built = pytorch_lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[average, callback, witness, saved], gradient_clip_val=clip,
    )  # fmt: skip
    module = OldName()
    built.fit(module, loader())
    assert (witness.steps, witness.violations) == (12, 0)
    assert_pruned(module, callback.masks, NUM_PRUNED)
    assert_plain(tmp_path / "old.ckpt", OldName(), NUM_PRUNED)
    assert callback._masks_gradients is (clip is not None)


# When gradients are masked.


class Reads(Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        """Another callback that could measure gradients."""


class Trusting(torch.optim.AdamW):
    """An optimizer of the user's own, that could do anything."""


@pytest.mark.parametrize(
    ("module", "others", "options", "expected"),
    [
        (Fusion, [], {}, False),
        (Fusion, [EMAWeightAveraging], {}, False),
        (Fusion, [], {"gradient_clip_val": 1.0}, True),
        (Fusion, [Reads], {}, True),
        (OwnClipping, [], {}, True),
        (ConfiguredClipping, [], {}, True),
        (Manual, [], {}, True),
    ],
)
def test_gradients_are_masked_only_where_they_are_read(module, others, options, expected):
    callback = pruning()
    fit(module(), *[other() for other in others], callback, **options)
    assert callback._masks_gradients is expected


def test_optimizers_that_take_weights_together_get_masked_gradients():
    class Own(Fusion):
        def configure_optimizers(self) -> Any:
            return Trusting(self.parameters(), 0.02)

    callback = pruning()
    fit(Own(), callback)
    assert callback._masks_gradients is True


# Only the first process speaks.


def test_other_processes_write_and_log_nothing(tmp_path, monkeypatch, capsys):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    memory = Memory()
    callback = pruning(figures=True, output_dir=str(tmp_path / "out"), schedule=Linear(0, 4))
    fit(Fusion(), callback, logger=memory, max_epochs=-1, max_steps=9)  # no warning of a run too short
    assert len(callback.events) == 3
    assert memory.metrics.keys().isdisjoint({"pruning/sparsity", "pruning/seconds"})
    assert "Pruned before epoch" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
