"""`Trainer.fit` with whole channels, and with 2:4: what is pruned, that it stays so, and what is refused."""

import copy
import csv
import pickle
import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from altermoma_pl import Channel, GraSP, Linear, NofM, OneShot, Rewinding, slim
from altermoma_pl.callback.checks import check_sharding
from altermoma_pl.cli import main
from tests.helpers.channel_models import WIDTHS, ManualTowers, Towers, channel_pruner
from tests.helpers.lightning_models import (
    Fusion,
    assert_same,
    dataset,
    fit,
    loader,
    nonzero_pruned,
    pruner,
    pruning_state_of,
    short,
    trainer,
)
from tests.helpers.masks import follows
from tests.helpers.processes import result_of
from tests.helpers.resuming import checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*batches were asked for"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:.*Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
    pytest.mark.filterwarnings("ignore:Total length of .DataLoader. across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*Using .DistributedSampler. with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*ModelParallelStrategy. is an experimental"),
]
pytest.importorskip("torch_pruning")
TWO_OF_FOUR = {"granularity": "2:4", "prunable": ["!*.0.weight"]}  # inputs of first layers are 1 and 3


def widths(callback):
    return {name: kept for name, (kept, _) in callback.events[-1]["widths"].items()}


class Watch(Callback):
    """Counts pruned weights that are not zero, after every batch."""

    def __init__(self, callback):
        self.callback, self.counts, self.sizes = callback, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.counts.append(nonzero_pruned(pl_module, self.callback.masks))
        self.sizes.append(self.callback.masks.num_kept)


def test_half_of_the_channels_go_in_multiples():
    module, callback = Towers(), channel_pruner()
    fit(module, callback)
    event = callback.events[-1]
    assert {name: total for name, (_, total) in event["widths"].items()} == WIDTHS
    assert sum(widths(callback).values()) == 12
    assert all(width % 2 == 0 and width > 0 for width in widths(callback).values())
    assert event["channels"] == 0.5
    assert 0 < event["flops"] < 1
    smaller = slim(module.eval(), callback.masks, (next(iter(loader()))[0],))
    assert smaller.difference <= 1e-5
    assert smaller.model.camera[0].out_channels == widths(callback)["camera.0"]
    assert smaller.model.lidar[2].out_features == widths(callback)["lidar.2"]


@pytest.mark.parametrize("kind", [{}, TWO_OF_FOUR], ids=["channel", "2:4"])
@pytest.mark.parametrize(
    ("module", "options", "more"),
    [
        (lambda: Towers("sgd"), {"gradient_clip_val": 0.1}, ()),
        (Towers, {"accumulate_grad_batches": 3}, ()),
        (Towers, {"precision": "bf16-mixed"}, ()),
        (Towers, {}, (EMAWeightAveraging(decay=0.5),)),
        (Towers, {"max_epochs": 4}, (StochasticWeightAveraging(0.01, swa_epoch_start=2),)),
        (ManualTowers, {}, ()),
    ],
    ids=["sgd", "accumulation", "mixed", "ema", "swa", "manual"],
)
def test_zeros_stay_through_every_step(module, options, more, kind):
    module, callback = module(), channel_pruner(schedule=Linear(0, 2), **kind)
    watch = Watch(callback)
    fit(module, callback, watch, *copy.deepcopy(more), **options)
    assert len(callback.events) == 3
    assert set(watch.counts) == {0}
    assert nonzero_pruned(module, callback.masks) == 0
    assert watch.sizes == sorted(watch.sizes, reverse=True)
    assert watch.sizes[0] > watch.sizes[-1]
    if kind:
        assert follows(callback.masks, 2, 4)
    else:
        assert callback.events[-1]["channels"] >= 0.5


def test_two_of_four_by_steps_and_the_layer_that_cannot_be_divided():
    callback = channel_pruner(**TWO_OF_FOUR, sparsity=0.5)
    fit(Towers(), callback)
    assert callback.masks.sparsity == 0.5
    with pytest.raises(ValueError, match=r"of 'camera.0.weight', 1 of shape .*prunable: \['!camera.0.weight"):
        fit(Towers(), channel_pruner(granularity="2:4"))


@pytest.mark.parametrize("schedule", [Linear(0, 3), Rewinding(2, 1, 1)], ids=["gradual", "rewinding"])
def test_resuming_equals_not_stopping(tmp_path, schedule):
    options = {"max_epochs": 5, "enable_checkpointing": True}
    module, callback = Towers(), channel_pruner(schedule=schedule)
    fit(module, callback, checkpoints(tmp_path), **options)
    path = tmp_path / "epoch=1-step=8.ckpt"
    other, again = Towers(), channel_pruner(schedule=schedule)
    torch.manual_seed(99)
    trainer(again, **options | {"enable_checkpointing": False}).fit(
        other, loader(), loader(seed=1), ckpt_path=path, weights_only=False
    )
    assert len(callback.events) >= 2
    assert_same(dict(other.state_dict()), dict(module.state_dict()))
    assert_same(dict(again.masks), dict(callback.masks))
    assert_same(again.events, callback.events)
    plain = Towers()
    plain.load_state_dict(torch.load(tmp_path / "epoch=4-step=20.ckpt", weights_only=True)["state_dict"])
    assert nonzero_pruned(plain, callback.masks) == 0


def of_checkpoint(path, callback, **options):
    trainer(callback, **{"max_epochs": 5, **options}).fit(
        Towers(), loader(), loader(seed=1), ckpt_path=path, weights_only=False
    )


def test_another_granularity_than_that_of_the_masks_is_refused(tmp_path):
    for name, kind in (("channel", {}), ("weight", {"granularity": "weight"})):
        folder = tmp_path / name
        fit(Towers(), channel_pruner(schedule=Linear(0, 3), **kind), checkpoints(folder),
            max_epochs=4, enable_checkpointing=True)  # fmt: skip
        other = channel_pruner(schedule=Linear(0, 3), **({} if kind else {"granularity": "weight"}))
        with pytest.raises(ValueError, match="and granularity that the masks were made for"):
            of_checkpoint(folder / "epoch=0-step=4.ckpt", other)


def test_nothing_is_left_to_train_and_a_second_fit(tmp_path):
    module, callback = Towers(), channel_pruner()
    fit(module, callback, checkpoints(tmp_path), enable_checkpointing=True)
    of_checkpoint(tmp_path / "epoch=2-step=12.ckpt", again := channel_pruner(), max_epochs=3)
    assert_same(dict(again.masks), dict(callback.masks))
    fit(module, callback)
    assert len(callback.events) == 1
    assert nonzero_pruned(module, callback.masks) == 0
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.masks == callback.masks
        fit(copy.deepcopy(module), copied)
        assert len(copied.events) == 1


def test_a_trial_run_has_one_event():
    callback = channel_pruner(schedule=Linear(0, 9))
    fit(Towers(), callback, fast_dev_run=True)
    assert callback.events[-1]["channels"] >= 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": short(beta="auto")},
        {"granularity": Channel("flops", 2)},
        {"scope": "modality"},
        {"scope": "layer"},
        {"scope": "modality", "sparsity": {"camera": 0.5, "lidar": 0.25, "shared": 0.0}},
    ],
    ids=["beta", "flops", "modality", "layer", "each"],
)
def test_other_options(options):
    callback = channel_pruner(schedule=Linear(0, 2), **options)
    fit(Towers(), callback)
    last = callback.events[-1]
    assert last["flops" if "granularity" in options else "channels"] >= (
        0.33 if isinstance(options.get("sparsity"), dict) else 0.5
    )
    assert ("beta" in last) == ("criterion" in options)


class Detached(Towers):
    def loss(self, batch):
        return super().loss(batch).detach().requires_grad_()


@pytest.mark.parametrize(
    ("module", "options", "data", "message"),
    [
        (Detached, {}, {}, "no channel of Detached can be removed. .*graph of gradients does not reach"),
        (Towers, {"sparsity": 0.95}, {}, r"sparsity 0\.95 cannot be reached"),
        (Towers, {}, {"val": loader(num=4, drop_last=True)}, "the held-out loader is empty"),
        (Towers, {"prunable": ["!lidar.*"]}, {}, "no channel of modality 'lidar' can be removed"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(module, options, data, message):
    module = module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(module, channel_pruner(**options), **data)
    assert_same(dict(module.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": GraSP()}, "GraSP scores single weights, not channels"),
        ({"store_components": True}, "store_components is for single weights"),
        ({"granularity": 124}, "in quotes: YAML reads 2:4 as 124"),
    ],
)
def test_options_that_cannot_go_with_channels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        channel_pruner(**options)


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr("altermoma_pl.callback.checks.is_sharded", lambda _: True)
    for grain in (Channel(), NofM()):
        with pytest.raises(ValueError, match=f"{re.escape(str(grain))} needs whole parameters"):
            check_sharding(Towers(), short(), OneShot(), grain, False)


def in_parallel():
    data = dataset()
    train = torch.utils.data.DataLoader(
        data, 4, sampler=torch.utils.data.DistributedSampler(data, shuffle=False)
    )
    module, callback = Towers("sgd"), channel_pruner(schedule=OneShot(0))
    fit(module, callback, train=train, strategy="ddp", devices=2, max_epochs=1)
    return {"masks": dict(callback.masks), "widths": widths(callback)}


def test_two_processes_prune_as_one():
    first, second = result_of(in_parallel)
    assert_same(first, second)
    callback = channel_pruner(schedule=OneShot(0), criterion=short(num_probe_batches=2))
    fit(Towers("sgd"), callback, train=loader(batch_size=8), max_epochs=1)
    assert first["widths"] == widths(callback)


CONFIG = """
seed_everything: false
model: {class_path: tests.helpers.channel_models.Towers}
data: {class_path: tests.helpers.lightning_models.Data}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
pruning:
  modalities: {camera: [camera], lidar: lidar}
  sparsity: SPARSITY
  criterion: Magnitude
  schedule: {class_path: OneShot, init_args: {epoch: 0}}
  granularity: GRANULARITY
  prunable: PRUNABLE
  figures: false
"""


@pytest.mark.parametrize(
    ("granularity", "prunable"),
    [
        (
            "{class_path: altermoma_pl.Channel, init_args: {target: flops, round_to: 4}}\n  min_density: 0",
            "null",
        ),
        ('"2:4"', "['!*.0.weight']"),
        ("{class_path: Channel, init_args: {round_to: 2}}", "null"),
    ],
)
def test_from_yaml_to_report(tmp_path, monkeypatch, capsys, granularity, prunable):
    path = tmp_path / "config.yaml"
    path.write_text(
        CONFIG.replace("GRANULARITY", granularity)
        .replace("PRUNABLE", prunable)
        .replace("SPARSITY", "0.4" if "flops" in granularity else "0.5")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["altermoma"])
    main(["fit", "--config", str(path)])
    (saved,) = tmp_path.rglob("*.ckpt")
    capsys.readouterr()
    main(["report", str(saved)])
    text = capsys.readouterr().out
    event = pruning_state_of(saved).events[-1]
    removed = (
        f", {event['channels']:.4f} of the channels removed, {event['flops']:.4f} of the FLOPs removed"
        if "Channel" in granularity
        else ""
    )
    title = " ".join(text.split("┏")[0].split())
    assert title == f"Kept weights: sparsity {event['sparsity']:.4f}{removed}"
    assert "bias" not in text
    assert "camera.3.weight" in text


def test_weights_alone_know_nothing_of_channels():
    callback = pruner()
    fit(Fusion(), callback)
    assert not {"widths", "channels", "flops"} & callback.events[-1].keys()


def test_metrics_and_figures_of_an_event(tmp_path):
    pytest.importorskip("matplotlib")
    callback = channel_pruner(schedule=OneShot(0), figures=True)
    fit(Towers(), callback, logger=CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=1)
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    found = {key: [row[key] for row in rows if row.get(key)] for key in ("pruning/channels", "pruning/flops")}
    event = callback.events[-1]
    assert found == {
        "pruning/channels": [str(event["channels"])],
        "pruning/flops": [str(event["flops"])],
    }
    assert {path.stem for path in tmp_path.rglob("*.png")} == {
        "kept_per_layer",
        "sparsity_over_epochs",
        "widths",
    }
