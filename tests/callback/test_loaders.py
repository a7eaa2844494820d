"""Where the batches for scoring come from, and what happens to each on its way."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from altermoma_pl import OneShot
from altermoma_pl.callback.loaders import Batches, _generators, probe_batches, training_batches
from tests.helpers.lightning_models import (
    Data,
    Fusion,
    assert_same,
    dataset,
    fit,
    loader,
    pruner,
    short,
    trainer,
)

FIRST = {seed: float(dataset(32, seed).tensors[0][0, 0]) for seed in range(6)}


class Seen(Fusion):
    """Remembers the first number of each batch that it is scored on."""

    def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        SEEN.append((batch_idx, float(batch[0][0, 0])))
        return self.loss(batch)


SEEN: list[tuple[int, float]] = []


def own_generator(seed: int) -> Any:
    return loader(seed=seed, shuffle=True, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


class Calibrated(Seen):
    def calibration_dataloader(self) -> Any:
        return loader(seed=3)


class CalibratedData(Data):
    def calibration_dataloader(self) -> Any:
        return loader(seed=4)


def fit_data(module: Any, data: LightningDataModule, callback: Any, **options: Any) -> Any:
    built = trainer(callback, max_epochs=2, **options)
    built.fit(module, datamodule=data)
    return built


def probes_only(**options: Any) -> Any:
    """One probe batch and no training: the batches seen are the probe batches."""
    return pruner(criterion=short(num_probe_batches=2, num_reactivation_steps=0), **options)


@pytest.mark.parametrize(
    ("which", "model", "data", "seed"),
    [
        ("auto", Seen, Data, 1),
        ("auto", Calibrated, Data, 3),
        ("auto", Seen, CalibratedData, 4),
        ("auto", Calibrated, CalibratedData, 4),
        ("calibration", Calibrated, Data, 3),
        ("calibration", Calibrated, CalibratedData, 4),
        ("validation", Calibrated, CalibratedData, 1),
        ("training", Calibrated, CalibratedData, 0),
    ],
)
def test_which_loader(which, model, data, seed):
    callback = probes_only(loader=which)
    fit_data(model(), data(), callback)
    assert len(callback.events) == 1
    assert SEEN[0] == (0, FIRST[seed])
    assert len(SEEN) == 10  # two batches in five passes
    assert SEEN[:2] * 5 == SEEN


def test_reactivation_trains_on_training_batches():
    callback = pruner(loader="validation", criterion=short(num_probe_batches=1, num_reactivation_steps=1))
    fit_data(Seen(), Data(), callback)
    probe, training = (0, FIRST[1]), (0, FIRST[0])
    assert [*[probe, training, probe] * 2, probe] == SEEN


def test_a_validation_loader_that_is_not_loaded_yet():
    callback = probes_only()
    ran = fit(Seen(), callback, check_val_every_n_epoch=5, max_epochs=2)
    assert SEEN[0] == (0, FIRST[1])
    assert "val_loss" not in ran.callback_metrics


def test_several_validation_loaders_follow_each_other():
    callback = pruner(criterion=short(num_probe_batches=8, num_reactivation_steps=0))
    fit(Seen(), callback, val=[loader(seed=1), loader(seed=2)])
    assert [index for index, _ in SEEN[:8]] == list(range(8))
    assert (SEEN[0][1], SEEN[4][1]) == (FIRST[1], FIRST[2])


def test_limits_hold_for_each_loader():
    callback = pruner(criterion=short(num_probe_batches=4, num_reactivation_steps=0))
    fit(Seen(), callback, val={"a": loader(seed=1), "b": loader(seed=2)}, limit_val_batches=2)
    assert [index for index, _ in SEEN[:4]] == [0, 1, 2, 3]
    assert (SEEN[0][1], SEEN[2][1]) == (FIRST[1], FIRST[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": loader(seed=1), "b": loader(16, seed=2)},
        lambda: [loader(seed=1), loader(16, seed=2)],
        lambda: CombinedLoader({"a": loader(seed=1), "b": loader(16, seed=2)}, "max_size_cycle"),
        lambda: [own_generator(1), {"b": own_generator(2)}],
    ],
    ids=["dict", "list", "combined", "own_generators"],
)
def test_several_training_loaders(make):
    class Both(Fusion):
        def loss(self, batch: Any) -> torch.Tensor:
            parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
            if isinstance(parts[-1], dict):
                parts[-1] = parts[-1]["b"]
            if isinstance(parts[0], torch.Tensor):
                return super().loss(parts)
            return super().loss(parts[0]) + super().loss(parts[1])

    plain, scored = Both(), Both()
    fit(plain, train=make())
    callback = pruner(sparsity=0.0, criterion=short(num_reactivation_steps=4))
    fit(scored, callback, train=make())
    assert len(callback.events) == 1
    assert_same(scored.state_dict(), plain.state_dict())


def test_combined_training_batches_are_counted():
    callback = pruner(loader="training", criterion=short(num_probe_batches=4))

    class Both(Fusion):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            assert set(batch) == {"a", "b"}
            return self.loss(batch["a"]) + self.loss(batch["b"])

    module = Both()
    ran = fit(module, callback, train={"a": loader(), "b": loader(16, seed=2)})
    assert callback.masks.num_kept == 60
    batches = Batches(ran, [loader(), loader(16)], 1.0)
    assert len(batches) == 6


@pytest.mark.parametrize(
    ("limit", "count"), [(0, 0), (1, 1), (3, 3), (9, 4), (0.5, 2), (1.0, 4), (0.0, 0)], ids=str
)
def test_limit_as_number_or_share(limit, count):
    ran = trainer()
    ran.strategy.connect(Fusion())
    batches = Batches(ran, [loader()], limit)
    assert len(batches) == count
    assert [index for index, _ in batches] == list(range(count))


def test_every_iteration_gives_the_same_order_and_rewinds():
    own = torch.Generator().manual_seed(1)
    ran = trainer()
    ran.strategy.connect(Fusion())
    batches = Batches(ran, [loader(shuffle=True, generator=own)], 1.0)
    orders = [[float(batch[0][0, 0]) for _, batch in batches] for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) != orders[0]
    batches.rewind()
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(1).get_state())


def test_generators_of_loader_sampler_and_batch_sampler_are_found():
    first, second, third = (torch.Generator() for _ in range(3))
    data = dataset()
    inner = torch.utils.data.RandomSampler(data, generator=second)
    batched = torch.utils.data.BatchSampler(inner, 8, drop_last=False)
    made = torch.utils.data.DataLoader(data, batch_sampler=batched, generator=first)
    assert {id(g) for g in _generators(made)} == {id(first), id(second)}
    sampled = torch.utils.data.DataLoader(
        data, 8, sampler=torch.utils.data.RandomSampler(data, generator=third)
    )
    assert [id(g) for g in _generators(sampled)] == [id(third)]
    assert _generators(["a batch"]) == []


def test_lists_of_batches_serve_as_loaders():
    class Listed(Seen):
        def calibration_dataloader(self) -> Any:
            return iter_free

    iter_free = [list(loader(seed=5)), list(loader(seed=3))]
    callback = pruner(loader="calibration", criterion=short(num_probe_batches=8, num_reactivation_steps=0))
    fit(Listed(), callback)
    assert (SEEN[0], SEEN[4]) == ((0, FIRST[5]), (4, FIRST[3]))


def test_training_with_overfit_batches_sees_those():
    callback = pruner(loader="training", criterion=short(num_probe_batches=2, num_reactivation_steps=0))
    fit(Seen(), callback, overfit_batches=2)
    assert len({value for _, value in SEEN}) == 2


# Hooks on the batch.


class Hooks:
    """Counts the three hooks of a batch and adds 1, 10, 100 to its numbers."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        CALLS.append("before")
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        CALLS.append("transfer")
        return [batch[0] + 10, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        CALLS.append("after")
        return [batch[0] + 100, batch[1]]


CALLS: list[str] = []


class HookedModule(Hooks, Seen):
    pass


class HookedData(Hooks, Data):
    pass


@pytest.mark.filterwarnings("ignore:You have overridden `.*` in")
@pytest.mark.parametrize(
    ("model", "data"),
    [(HookedModule, Data), (Seen, HookedData), (HookedModule, HookedData)],
    ids=["module", "datamodule", "both"],
)
def test_batch_hooks_are_called_once_for_each_batch(model, data):
    CALLS.clear()
    callback = pruner(schedule=OneShot(0), criterion=short(num_probe_batches=1, num_reactivation_steps=0))
    fit_data(model(), data(), callback, limit_train_batches=0.25, check_val_every_n_epoch=9)
    num_batches = 5 + 2  # five probes while scoring, one training batch in each of two epochs
    assert ["before", "transfer", "after"] * num_batches == CALLS
    assert SEEN[0][1] == pytest.approx(FIRST[1] + 111, abs=1e-4)


def test_a_convert_of_the_precision_reaches_probe_batches():
    kinds: list[torch.dtype] = []

    class Kinds(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            kinds.append(batch[0].dtype)
            return self.loss(batch)

    fit(Kinds(), pruner(), precision="64-true")
    assert set(kinds) == {torch.float64}


def test_the_functions_need_no_callback():
    class Own(Fusion):
        def on_train_start(self) -> None:
            lengths.append(len(probe_batches(self.trainer, self, "validation")))
            lengths.append(len(probe_batches(self.trainer, self, "training")))
            lengths.append(len(training_batches(self.trainer)))

    lengths: list[int] = []
    fit(Own(), train=loader(24), max_epochs=1)
    assert lengths == [4, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("overridden", [True, False])
def test_pytorch_lightning_and_its_datamodules(overridden):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.camera, self.lidar = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("module")
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            calls.append("step")
            self.log("train_loss", 1.0)
            return (self.camera(batch[0][:, :3]) + self.lidar(batch[0][:, 3:])).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append("step")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class PlainData(pl.LightningDataModule):
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader

    class OwnData(PlainData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("data")
            return batch

    calls: list[str] = []
    callback = pruner()
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    built = pl.Trainer(
        max_epochs=2, accelerator="cpu", enable_progress_bar=False, callbacks=[callback], **options
    )
    data = OwnData() if overridden else PlainData()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in both")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings(
            "ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`"
        )
        built.fit(Module(), datamodule=data)
    assert callback.masks.num_kept == 12
    assert ["data" if overridden else "module", "step"] * (len(calls) // 2) == calls
