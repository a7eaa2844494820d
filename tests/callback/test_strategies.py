"""`Trainer.fit` on two processes, with whole and with sharded parameters, is that on one."""

import dataclasses

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from altermoma_pl import GraSP, Linear, Masks, Rewinding
from altermoma_pl.callback.checks import check_strategy
from altermoma_pl.model.distributed import full, rank
from tests.helpers.lightning_models import MODALITIES, Fusion, dataset, fit, loader, pruner, short, trainer
from tests.helpers.processes import in_processes, result_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*batches were asked for"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
    pytest.mark.filterwarnings("ignore:.*Using .DistributedSampler. with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*ModelParallelStrategy. is an experimental"),
]
SCHEDULE = Linear(1, 2)
PROBES = 4


class Plain(Fusion):
    """Nothing that depends on how samples are divided into batches, and probe batches of its own."""

    probe_size = 8

    def __init__(self):
        super().__init__()
        self.camera = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.lidar = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.double()

    def loss(self, batch):
        return super().loss([tensor.double() for tensor in batch])

    def calibration_dataloader(self):
        return loader(seed=1, batch_size=self.probe_size)


class Sharded(Plain):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.camera, self.lidar, self.head):
            fully_shard(part, mesh=mesh)


def divided():
    """Each process has half of every batch of 8; the Trainer would shuffle."""
    data = dataset()
    return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))


def options(**changes):
    return {"max_epochs": 4, **changes}


def callback(**changes):
    criterion = short(num_probe_batches=PROBES, num_reactivation_steps=3)
    return pruner(
        **{
            "schedule": SCHEDULE,
            "sparsity": 0.6,
            "criterion": criterion,
            "store_components": False,
            **changes,
        }
    )


def outcome(module, ours):
    weights = {name: full(p.detach()).clone() for name, p in module.named_parameters()}
    masks = Masks.from_state_dict(ours.state_dict()["masks"])
    return {"weights": weights, "masks": masks, "events": ours.events, "layers": ours.report().layers}


def assert_alike(found, expected):
    assert found["masks"] == expected["masks"]
    assert found["layers"] == expected["layers"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-9)
    for name, mask in found["masks"].items():
        assert not found["weights"][name][~mask].any()
    for event, other in zip(found["events"], expected["events"], strict=True):
        assert event["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert {k: event[k] for k in ("epoch", "sparsity", "kept")} == {
            k: other[k] for k in ("epoch", "sparsity", "kept")
        }


def on_one(probe_size=8, **changes):
    module, ours = Plain(), callback(**changes)
    module.probe_size = probe_size
    fit(module, ours, train=loader(batch_size=8), **options())
    return outcome(module, ours)


def replicated(kwargs, **changes):
    module, ours = Plain(), callback(**kwargs)
    fit(module, ours, train=divided(), strategy="ddp", devices=2, **options(**changes))
    return outcome(module, ours)


def test_data_parallel_training_is_that_of_one_process():
    first, second = result_of(replicated, {})
    assert first["masks"] == second["masks"]
    assert_alike(first, on_one())
    assert_alike(second, on_one())
    assert first["masks"].num_kept == 48  # of 120


def of_shards(folder, save_distributed):
    module, ours = Sharded(), callback()
    saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=save_distributed)
    ran = fit(
        module, ours, saved, train=divided(), strategy=strategy, devices=2,
        enable_checkpointing=True, **options(),
    )  # fmt: skip
    assert ours.masks.sharded
    assert {name: mask.to_local().shape[0] for name, mask in ours.masks.items()} == {
        "camera.0.weight": 4, "camera.2.weight": 2, "lidar.0.weight": 4, "lidar.2.weight": 2,
        "head.weight": 1 - rank(),
    }  # fmt: skip
    return outcome(module, ours), ran.global_step


def test_sharded_training_is_that_of_one_process(tmp_path):
    (first, steps), (second, _) = result_of(of_shards, tmp_path, True)
    assert steps == 16
    criterion = dataclasses.replace(callback().criterion, num_probe_batches=PROBES // 2)
    expected = on_one(probe_size=16, criterion=criterion)
    assert_alike(first, expected)
    assert_alike(second, expected)


def resumed(path):
    module, ours = Sharded(), callback()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    built = trainer(ours, strategy=ModelParallelStrategy(2, 1), devices=2, **options())
    built.fit(module, divided(), loader(seed=1), ckpt_path=path)
    return outcome(module, ours)


@pytest.mark.parametrize("save_distributed", [True, False], ids=["folder", "file"])
def test_a_sharded_run_resumes(tmp_path, save_distributed):
    (expected, _), _ = result_of(of_shards, tmp_path, save_distributed)
    for epoch in (0, 1, 2):
        for found in result_of(resumed, tmp_path / f"epoch={epoch}.ckpt"):
            assert_alike(found, expected)
            assert torch.equal(found["weights"]["head.weight"], expected["weights"]["head.weight"])


def test_a_checkpoint_of_shards_is_plain(tmp_path):
    (expected, _), _ = result_of(of_shards, tmp_path, False)
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    plain = Plain()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    masks = Masks.from_state_dict(checkpoint["callbacks"]["AlterMOMACallback"]["masks"])
    assert masks == expected["masks"]
    for name, weight in expected["weights"].items():
        assert torch.equal(plain.get_parameter(name).detach(), weight)


# What must not differ, and what cannot work.


def different_targets():
    replicated({"sparsity": 0.6 if rank() == 0 else 0.7})


def test_masks_that_differ_between_processes_are_an_error_in_all():
    for error in in_processes(different_targets):
        assert isinstance(error, RuntimeError)
        assert str(error).startswith("the masks of process [1] are not those of process 0")


def sharded_with(kwargs):
    strategy = ModelParallelStrategy(2, 1)
    fit(Sharded(), callback(**kwargs), train=divided(), strategy=strategy, devices=2, **options())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": GraSP()}, "GraSP needs whole parameters"),
        ({"schedule": Rewinding(2, 1)}, "Rewinding keeps a copy of whole parameters"),
        ({"store_components": True}, "store_components=True would save one process's rows"),
    ],
)
def test_what_needs_whole_parameters_is_refused(kwargs, message):
    for error in in_processes(sharded_with, kwargs):
        assert isinstance(error, ValueError)
        assert str(error).startswith(message)
        assert "strategy='ddp'" in str(error)


class FSDPStrategy:
    """Only the name counts: the real ones need a GPU, or a package that is not installed."""


class DeepSpeedStrategy(FSDPStrategy):
    pass


class OwnStrategy:
    pass


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, OwnStrategy])
def test_other_strategies_are_refused(strategy):
    built = type("Trainer", (), {"strategy": strategy()})()
    with pytest.raises(ValueError, match=f"does not work with {strategy.__name__}.*: use strategy='ddp', or"):
        check_strategy(built)


# Loaders.


class Counting(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)

    def calibration_dataloader(self):
        return DataLoader(dataset(28, seed=1), 4)


def shares():
    from altermoma_pl.callback.loaders import probe_batches

    class Look(type(callback())):
        def on_train_start(self, trainer, pl_module):
            batches = probe_batches(trainer, pl_module, "calibration")
            seen.append((len(batches), [batch[0][0, 0].item() for _, batch in batches]))
            super().on_train_start(trainer, pl_module)

    seen = []
    fit(Counting(), Look(MODALITIES, figures=False, schedule=SCHEDULE, criterion=callback().criterion),
        train=divided(), strategy="ddp", devices=2, **options(max_epochs=3))  # fmt: skip
    return seen[0]


def test_processes_divide_the_calibration_loader():
    (first, one), (second, other) = result_of(shares)
    assert (first, second) == (4, 3)
    expected = [x[0, 0].item() for x, _ in DataLoader(dataset(28, seed=1), 4)]
    assert one == pytest.approx(expected[::2])
    assert other == pytest.approx(expected[1::2])
