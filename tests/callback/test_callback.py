"""The callback in a run: what it changes, what it does not, and under which Trainer options."""

import csv
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from altermoma_pl import Cubic, Exponential, Linear, Magnitude, Masks, OneShot
from tests.helpers.lightning_models import (
    PRUNABLE,
    Augmented,
    Data,
    Fusion,
    Manual,
    assert_same,
    dataset,
    fit,
    loader,
    nonzero_pruned,
    num_zeros,
    pruner,
    short,
    trainer,
)
from tests.helpers.masks import shrank


class Watch(Callback):
    """Looks at the weights right after every optimizer step; its hooks run after the pruner's."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning
        self.steps = 0
        self.violations = 0
        self.masks: list[Masks] = []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        def look(*_: Any) -> None:
            self.steps += 1
            self.violations += nonzero_pruned(pl_module, self.pruning.masks)
            self.masks.append(self.pruning.masks)

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(look)


# With sparsity 0 the run is the same as without the callback.


def outcome(module: LightningModule, ran: Any) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "optimizer": ran.optimizers[0].state_dict(),
        "metrics": dict(ran.callback_metrics),
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda shuffle: loader(),
        lambda shuffle: loader(shuffle=shuffle),
        lambda shuffle: loader(shuffle=shuffle, generator=torch.Generator().manual_seed(5)),
        lambda shuffle: DataLoader(Augmented(), 8, shuffle=shuffle),
        pytest.param(
            lambda shuffle: DataLoader(
                Augmented(), 8, shuffle=shuffle, num_workers=1, persistent_workers=True
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["in_order", "shuffled", "own_generator", "augmented", "persistent_workers"],
)
def test_sparsity_zero_is_a_run_without_the_callback(make):
    plain, scored, callback = Fusion(), Fusion(), pruner(sparsity=0.0, schedule=Cubic(end=1))
    without = fit(plain, train=make(True), val=make(False))
    with_it = fit(scored, callback, train=make(True), val=make(False))
    assert [event["epoch"] for event in callback.events] == [0, 1]
    assert callback.components is not None
    assert_same(outcome(scored, with_it), outcome(plain, without))


@pytest.mark.parametrize("which", ["validation", "training"])
@pytest.mark.parametrize("noise", ["suppressed", "as_is"])
def test_sparsity_zero_with_every_source_of_batches(which, noise):
    plain, scored = Fusion("sgd"), Fusion("sgd")
    callback = pruner(sparsity=0.0, loader=which, criterion=short(noise=noise))
    without = fit(plain, train=loader(shuffle=True), accumulate_grad_batches=2)
    with_it = fit(scored, callback, train=loader(shuffle=True), accumulate_grad_batches=2)
    assert len(callback.events) == 1
    assert_same(outcome(scored, with_it), outcome(plain, without))


# Zeros.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    ],
    ids=["plain", "clipped", "accumulated", "both"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_after_every_step(optimizer, options):
    callback = pruner(sparsity=0.8, schedule=Linear(0, 2))
    module, watch = Fusion(optimizer), Watch(callback)
    fit(module, callback, watch, max_epochs=4, **options)
    assert watch.steps == 4 * (2 if "accumulate_grad_batches" in options else 4)
    assert watch.violations == 0
    assert num_zeros(module) == 96  # 0.8 * 120
    assert all(shrank(later, earlier) for earlier, later in zip(watch.masks, watch.masks[1:], strict=False))


def test_manual_optimization_with_two_optimizers():
    callback = pruner(sparsity=0.8, schedule=Linear(0, 1))
    module, watch = Manual(), Watch(callback)
    fit(module, callback, watch)
    assert (watch.steps, watch.violations) == (24, 0)  # 3 epochs, 4 batches, 2 optimizers
    assert num_zeros(module) == 96


def test_zeros_stay_zero_where_gradients_come_unmasked():
    """With raw optimizers Lightning has no hook before the step: momentum alone would move weights."""

    class Raw(Manual):
        def optimizers(self, use_pl_optimizer: bool = False) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    callback = pruner(sparsity=0.8, schedule=Linear(0, 1))
    module, watch = Raw(), Watch(callback)
    fit(module, callback, watch)
    assert (watch.steps, watch.violations) == (24, 0)
    assert num_zeros(module) == 96


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_where_a_later_hook_changes_gradients(optimizer):
    class Noisy(Fusion):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad += 0.1

    callback = pruner(sparsity=0.8, schedule=Linear(0, 1))
    module, watch = Noisy(optimizer), Watch(callback)
    fit(module, callback, watch)
    assert (watch.steps, watch.violations) == (12, 0)
    assert num_zeros(module) == 96


def test_gradients_of_pruned_weights_take_no_part_in_clipping():
    class Norms(Callback):
        def __init__(self) -> None:
            self.pruned: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            parameters = dict(pl_module.named_parameters())
            self.pruned += [float(parameters[n].grad[~m].abs().sum()) for n, m in callback.masks.items()]

    callback, norms = pruner(sparsity=0.5, schedule=OneShot(0)), Norms()
    fit(Fusion(), callback, norms, max_epochs=1)
    assert norms.pruned == [0.0] * (4 * 5)  # batches times masked tensors


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("sgd", ["momentum_buffer"]), ("adamw", ["exp_avg", "exp_avg_sq"])]
)
def test_moments_of_pruned_weights_are_zero_right_after_the_event(optimizer, moments):
    found: list[tuple[int, int]] = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch != 1:
                return
            parameters = dict(pl_module.named_parameters())
            for name, mask in callback.masks.items():
                for moment in moments:
                    value = trainer.optimizers[0].state[parameters[name]][moment]
                    found.append((int(value[~mask].count_nonzero()), int(value[mask].count_nonzero())))

    callback = pruner(sparsity=0.5, schedule=OneShot(1))
    fit(Fusion(optimizer), callback, Look(), max_epochs=2)
    assert len(found) == len(PRUNABLE) * len(moments)
    assert [pruned for pruned, _ in found] == [0] * len(found)
    assert sum(kept for _, kept in found) > 0


def test_weights_without_state_get_none():
    class Partly(Fusion):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), 0.1, momentum=0.9)

    module, callback = Partly(), pruner(schedule=OneShot(1))
    ran = fit(module, callback)
    assert set(ran.optimizers[0].state) == {module.head.weight, module.head.bias}
    assert num_zeros(module) == 60


@pytest.mark.parametrize(
    ("schedule", "zeros"),
    [
        (OneShot(2), {2: 96}),
        (Linear(0, 2), {0: 32, 1: 64, 2: 96}),  # 96/3 each
        (Linear(1, 4, every=2), {1: 32, 3: 64, 4: 96}),
        (Cubic(0, 1), {0: 84, 1: 96}),  # 96 * (1 - 1/8)
        (Exponential(0, 1), {0: 66, 1: 96}),  # 120 * (1 - sqrt(0.2)) = 66.3
    ],
)
def test_events_of_the_schedule(schedule, zeros):
    callback = pruner(sparsity=0.8, schedule=schedule, criterion=Magnitude())
    module = Fusion()
    fit(module, callback, max_epochs=5)
    assert [event["epoch"] for event in callback.events] == list(zeros)
    assert [event["step"] for event in callback.events] == [4 * epoch for epoch in zeros]
    assert [event["sparsity"] for event in callback.events] == [1 - (120 - n) / 120 for n in zeros.values()]
    assert num_zeros(module) == 96
    assert callback.masks.num_kept == 24


def test_magnitude_keeps_the_largest_weights():
    module, callback = Fusion(), pruner(schedule=OneShot(0), criterion=Magnitude(), min_density=0)
    before = torch.cat([dict(module.named_parameters())[n].detach().abs().flatten() for n in PRUNABLE])
    fit(module, callback, max_epochs=1)
    kept = torch.cat([callback.masks[name].flatten() for name in PRUNABLE])
    assert int(kept.sum()) == 60
    assert before[kept].min() >= before[~kept].max()


@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        ({"scope": "layer"}, [12, 16, 12, 16, 4]),
        ({"scope": "modality", "sparsity": {"camera": 0.75, "lidar": 0.25, "shared": 0.0}}, [42, 14, 0]),
    ],
)
def test_scope_holds_counts_exactly(options, zeros):
    module, callback = Fusion(), pruner(**options)
    fit(module, callback)
    layers = [num_zeros(module, [name]) for name in PRUNABLE]
    groups = [sum(layers[:2]), sum(layers[2:4]), layers[4]]
    assert zeros == (layers if options["scope"] == "layer" else groups)


def test_prunable_patterns_and_floor():
    module, callback = Fusion(), pruner(sparsity=0.85, prunable=["!head"], min_density=0.1)
    fit(module, callback)
    assert "head.weight" not in callback.masks
    assert callback.masks.num_kept == 17  # 112 - round(95.2)
    assert all(int(mask.sum()) >= 3 for mask in callback.masks.values())


# Life of the callback object.


def test_before_fit_there_is_nothing():
    callback = pruner()
    assert (callback.masks, callback.components, callback.events) == (None, None, [])
    with pytest.raises(ValueError, match="nothing was pruned yet"):
        callback.report()


def test_after_fit_everything_is_reported():
    callback = pruner(sparsity=0.5)
    fit(Fusion(), callback)
    assert callback.report().sparsity == 0.5
    assert callback.events[0]["kept"].keys() == {"camera", "lidar", "shared"}
    assert callback.events[0]["losses"] == callback.components.losses
    assert set(callback.components.losses) == {
        "all",
        "without_camera",
        "without_camera_reactivated",
        "without_lidar",
        "without_lidar_reactivated",
    }


def test_components_are_dropped_on_request():
    callback = pruner(store_components=False)
    fit(Fusion(), callback)
    assert callback.components is None
    assert "all" in callback.events[0]["losses"]


def test_steps_after_fit_are_free():
    module, callback = Fusion("sgd"), pruner()
    ran = fit(module, callback)
    assert num_zeros(module) == 60
    optimizer = ran.optimizers[0]
    module.loss(next(iter(loader()))).backward()
    optimizer.step()
    assert num_zeros(module) < 60


def test_steps_after_an_exception_are_free():
    class Fails(Fusion):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                raise RuntimeError("the user's own")

    module, callback = Fails("sgd"), pruner()
    built = trainer(callback)
    with pytest.raises(RuntimeError, match="the user's own"):
        built.fit(module, loader(), loader(seed=1))
    assert num_zeros(module) == 60
    module.loss(next(iter(loader()))).backward()
    built.optimizers[0].step()
    assert num_zeros(module) < 60


def test_a_second_fit_of_the_pruned_model_prunes_no_more():
    module, callback = Fusion(), pruner()
    fit(module, callback)
    masks, watch = callback.masks, Watch(callback)
    fit(module, callback, watch)
    assert callback.masks == masks
    assert len(callback.events) == 1
    assert watch.violations == 0
    assert num_zeros(module) == 60


def test_a_second_fit_to_a_higher_sparsity_prunes_on():
    module, callback = Fusion(), pruner()
    fit(module, callback)
    masks = callback.masks
    callback.sparsity = 0.8
    fit(module, callback)
    assert shrank(callback.masks, masks)
    assert num_zeros(module) == 96


def test_a_second_fit_of_another_trainer_goes_on_with_the_zeros_of_the_first():
    module, callback = Fusion(), pruner()
    built = trainer(callback, max_epochs=2)
    built.fit(module, loader(), loader(seed=1))
    built.fit_loop.max_epochs = 4
    built.fit(module, loader(), loader(seed=1))
    assert built.current_epoch == 4
    assert len(callback.events) == 1
    assert num_zeros(module) == 60


def test_two_callbacks_have_states_of_their_own():
    first, second = pruner(), pruner(sparsity=0.2)
    fit(Fusion(), first)
    assert second.masks is None
    assert second.events == []


# Trainer options.


@pytest.mark.parametrize(
    "options",
    [
        {"num_sanity_val_steps": 2},
        {"limit_train_batches": 3, "limit_val_batches": 2},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
        {"max_epochs": -1, "max_steps": 10},
        {"max_epochs": None, "max_steps": 10},
        {"check_val_every_n_epoch": 5},
        {"val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"precision": "bf16-mixed"},
        {"inference_mode": False},
        {"deterministic": False, "detect_anomaly": True},
    ],
    ids=str,
)
def test_trainer_options(options):
    module, callback = Fusion(), pruner()
    watch = Watch(callback)
    fit(module, callback, watch, **options)
    assert [event["epoch"] for event in callback.events] == [1]
    assert num_zeros(module) == 60
    assert watch.violations == 0
    assert watch.steps > 2


def test_sanity_check_changes_nothing():
    results = []
    for steps in (0, 2):
        module, callback = Fusion(), pruner()
        fit(module, callback, num_sanity_val_steps=steps)
        results.append((module.state_dict(), callback.masks))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.25, 1), (1.0, 4)])
def test_limits_hold_for_probe_batches(limit, batches):
    seen: list[int] = []

    class Counts(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch_idx)
            return self.loss(batch)

    callback = pruner(criterion=short(num_probe_batches=batches, num_reactivation_steps=0))
    fit(Counts(), callback, limit_val_batches=limit)
    # All, then before and after reactivation for each of two modalities.
    assert seen == list(range(batches)) * 5


def test_overfit_batches_needs_a_loader_of_its_own():
    class Calibrated(Fusion):
        def calibration_dataloader(self) -> Any:
            return loader(seed=4)

    module, callback = Calibrated(), pruner(loader="training")
    fit(module, callback, overfit_batches=2)
    assert num_zeros(module) == 60
    module, callback = Calibrated(), pruner(loader="calibration")
    fit(module, callback, overfit_batches=2)
    assert num_zeros(module) == 60


def test_barebones(capsys):
    module, callback = Fusion(), pruner(figures=True)
    built = trainer(
        callback, barebones=True, logger=None, enable_checkpointing=None, enable_progress_bar=None,
        enable_model_summary=None, num_sanity_val_steps=None,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="barebones"):
        built.fit(module, loader(), loader(seed=1))
    assert num_zeros(module) == 60
    assert "Pruned before epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("schedule", [OneShot(7), Cubic(end=4)])
def test_fast_dev_run_prunes_at_once_to_the_final_sparsity(schedule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, callback = Fusion(), pruner(schedule=schedule, figures=True)
    with pytest.warns(UserWarning, match="the loader has 1"):
        fit(module, callback, fast_dev_run=True, logger=True, enable_checkpointing=True)
    assert [(event["epoch"], event["sparsity"]) for event in callback.events] == [(0, 0.5)]
    assert num_zeros(module) == 60
    assert os.listdir(tmp_path) == []


def test_fast_dev_run_writes_nothing_even_with_a_folder(tmp_path):
    callback = pruner(figures=True, output_dir=str(tmp_path / "out"))
    fit(Fusion(), callback, fast_dev_run=2)
    assert len(callback.events) == 1
    assert os.listdir(tmp_path) == []


def test_without_logger_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    callback = pruner(figures=True)
    fit(Fusion(), callback)
    assert len(callback.events) == 1
    assert os.listdir(tmp_path) == []
    assert "Pruned before epoch 1" in capsys.readouterr().out


def test_output_dir_takes_figures_without_a_logger(tmp_path):
    fit(Fusion(), pruner(figures=True, output_dir=str(tmp_path / "out")))
    assert sorted(os.listdir(tmp_path / "out")) == [
        "importance_against_redundancy.png",
        "kept_per_layer.png",
        "sparsity_over_epochs.png",
    ]


def test_figures_off_writes_none(tmp_path):
    fit(Fusion(), pruner(figures=False, output_dir=str(tmp_path / "out")))
    assert os.listdir(tmp_path) == []


def test_tensorboard_gets_figures_and_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    callback = pruner(figures=True)
    fit(Fusion(), callback, logger=logger, log_every_n_steps=1)
    read = EventAccumulator(logger.log_dir)
    read.Reload()
    assert set(read.Tags()["images"]) == {
        "pruning/importance_against_redundancy",
        "pruning/kept_per_layer",
        "pruning/sparsity_over_epochs",
    }
    assert [(e.step, e.value) for e in read.Scalars("pruning/sparsity")] == [(4, 0.5)]
    assert "pruning/kept/camera" in read.Tags()["scalars"]
    assert (tmp_path / "lightning_logs" / "version_0" / "pruning" / "kept_per_layer.png").exists()


def test_csv_logger_gets_metrics(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = pruner(schedule=Linear(0, 1))
    fit(Fusion(), callback, logger=logger, log_every_n_steps=1)
    with open(os.path.join(logger.log_dir, "metrics.csv")) as file:
        rows = list(csv.DictReader(file))
    found = [(row["step"], row["pruning/sparsity"]) for row in rows if row["pruning/sparsity"]]
    assert found == [("0", "0.25"), ("4", "0.5")]
    kept = callback.events[-1]["kept"]
    last = [row for row in rows if row["pruning/sparsity"]][-1]
    assert {group: float(last[f"pruning/kept/{group}"]) for group in kept} == pytest.approx(kept)
    assert float(last["pruning/loss/all"]) == pytest.approx(callback.events[-1]["losses"]["all"])
    assert float(last["pruning/seconds"]) > 0


def test_the_table_is_printed_once_for_each_event(capsys):
    fit(Fusion(), pruner(schedule=Linear(0, 1)))
    out = capsys.readouterr().out
    assert out.count("Pruned before epoch") == 2
    assert "Pruned before epoch 1 in" in out
    assert "sparsity 0.5000" in out
    assert "camera.0.weight" in out


def test_a_frozen_norm_stays_frozen():
    class Frozen(Fusion):
        def on_train_epoch_start(self) -> None:
            self.camera[1].eval()

    module, callback = Frozen(), pruner()
    fit(module, callback)
    assert torch.equal(module.camera[1].running_mean, torch.zeros(8))
    assert num_zeros(module) == 60


def test_iterable_dataset_without_length():
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from Data().train_dataloader().dataset

    module, callback = Fusion(), pruner()
    fit(module, callback, train=DataLoader(Stream(), 8), val=DataLoader(Stream(), 8))
    assert num_zeros(module) == 60


def test_sampler_with_epochs_sees_the_same_batches():
    """`set_epoch` is called by Lightning; scoring must not move it."""

    def make() -> DataLoader[Any]:
        data = loader().dataset
        return DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0, shuffle=True))

    plain, scored = Fusion(), Fusion()
    fit(plain, train=make())
    fit(scored, pruner(sparsity=0.0), train=make())
    assert_same(scored.state_dict(), plain.state_dict())


def test_ema_like_averaging_beside_it_sees_zeros():
    """A callback that copies weights after each batch, as weight averaging does, copies exact zeros."""
    seen: list[int] = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(num_zeros(pl_module))

    fit(Fusion(), pruner(schedule=OneShot(0)), Copies(), max_epochs=1)
    assert seen == [60] * 4


def test_probe_batches_that_are_not_finite_are_left_out_and_counted(capsys):
    data = dataset(32, seed=1)
    data.tensors[0][9] = float("nan")  # of the second batch of 8
    val = DataLoader(data, 8)
    with pytest.raises(ValueError, match=r"the loss of probe batch 1 is nan.*on_nonfinite='skip'"):
        fit(Fusion(), pruner(schedule=OneShot(0)), val=val)
    callback = pruner(schedule=OneShot(0), on_nonfinite="skip")
    module = Fusion()
    fit(module, callback, val=val, limit_val_batches=2)
    assert callback.events[0]["num_skipped"] == 5  # with all, and without each before and after reactivation
    assert "5 batches were not finite" in " ".join(capsys.readouterr().out.split())
    assert num_zeros(module) == 60
