"""Rewinding: every event brings the run back to the same start, with fewer weights."""

import copy
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from altermoma_pl import Magnitude, OneShot, Random, Rewinding
from altermoma_pl.callback.rewinding import RewindPoint
from tests.helpers.lightning_models import (
    Fusion,
    Manual,
    assert_same,
    dataset,
    fit,
    loader,
    num_zeros,
    pruner,
    short,
    trainer,
)
from tests.helpers.masks import shrank
from tests.helpers.resuming import KEY, Steady, at, checkpoints, outcome, resumed

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint")


# By hand: the loss is <g, w>, so gradients are g whatever the weights; two steps an epoch.
#   SGD with momentum 0.5, learning rate 0.1 that halves with every step: one epoch moves w by
#   -(0.1 * g + 0.05 * 1.5 * g) = -0.175 * g, leaves the momentum 1.5 * g, the rate 0.025.
GRADIENT = {"camera.weight": [[0.0, 20.0]], "lidar.weight": [[0.0, 0.0]]}
START = {"camera.weight": [[1.0, 4.0]], "lidar.weight": [[2.0, 3.0]]}


class Toy(LightningModule):
    """Four weights, a buffer that counts steps, and another one that checkpoints do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.lidar = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        for name, value in START.items():
            self.get_parameter(name).data = torch.tensor(value)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.count += 1
        self.hidden += 0.5
        return sum((torch.tensor(g) * self.get_parameter(n)).sum() for n, g in GRADIENT.items())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There is nothing to validate."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Look(Callback):
    """Copies the state of the run at every start of an epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(
            copy.deepcopy(
                {
                    "parameters": {n: p.detach() for n, p in pl_module.named_parameters()},
                    "buffers": dict(pl_module.named_buffers()),
                    "optimizers": [o.state_dict() for o in trainer.optimizers],
                    "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
                }
            )
        )


def toy_run(schedule: Rewinding, epochs: int) -> tuple[list[list[Any]], Any]:
    """Weights, momentum, buffers and rates at every start of an epoch, after the event, as plain numbers."""
    look, callback = Look(), pruner(sparsity=0.75, criterion=Magnitude(), min_density=0.0, schedule=schedule)
    fit(Toy(), callback, look, train=loader(num=4, batch_size=2), max_epochs=epochs)
    rows = []
    for seen in look.seen:
        (optimizer,), (scheduler,) = seen["optimizers"], seen["schedulers"]
        momenta = [each["momentum_buffer"].flatten().tolist() for each in optimizer["state"].values()]
        rows.append(
            [
                [value.flatten().tolist() for value in seen["parameters"].values()],
                momenta,
                (seen["buffers"]["count"].item(), seen["buffers"]["hidden"].item()),
                (optimizer["param_groups"][0]["lr"], scheduler["last_epoch"]),
            ]
        )
    return rows, callback


def test_from_the_start_by_hand():
    rows, callback = toy_run(Rewinding(rounds=2, epochs_per_round=2), 4)
    # Event 0 judges 1, 4, 2, 3 and keeps 4 and 3. Until event 1 the 4 falls to 4 - 3.5 - 20 * (0.025 *
    # 1.75 + 0.0125 * 1.875) = -0.84: of |-0.84| and 3 the 3 is kept, although 4 is what it was rewound to.
    assert rows[0] == [[[0.0, 4.0], [0.0, 3.0]], [], (0, 0.0), (0.1, 0)]
    assert rows[1][0] == [[0.0, pytest.approx(0.5, rel=1e-6)], [0.0, 3.0]]
    assert rows[1][1:] == [[[0.0, 30.0], [0.0, 0.0]], (2, 1.0), (0.025, 2)]
    assert rows[2] == [[[0.0, 0.0], [0.0, 3.0]], [], (0, 0.0), (0.1, 0)]
    assert [(event["epoch"], event["step"], event["sparsity"]) for event in callback.events] == [
        (0, 0, 0.5),
        (2, 4, 0.75),
    ]


def test_to_an_early_epoch_by_hand():
    rows, callback = toy_run(Rewinding(rounds=2, epochs_per_round=1, rewind_epoch=1), 3)
    # At the start of epoch 1 the weights are 1, 0.5, 2, 3. Event 0 keeps 2 and 3, whose gradients are
    # zero; the momentum of the 0.5 is pruned with it. Event 1 keeps 3.
    assert rows[0] == [[[1.0, 4.0], [2.0, 3.0]], [], (0, 0.0), (0.1, 0)]
    assert rows[1] == [[[0.0, 0.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], (2, 1.0), (0.025, 2)]
    assert rows[2] == [[[0.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], (2, 1.0), (0.025, 2)]
    assert [event["epoch"] for event in callback.events] == [1, 2]


def test_momentum_goes_back_to_that_of_an_early_epoch(monkeypatch):
    monkeypatch.setitem(GRADIENT, "lidar.weight", [[0.0, -4.0]])
    rows, _ = toy_run(Rewinding(rounds=2, epochs_per_round=1, rewind_epoch=1), 3)
    # The last weight is 3 + 0.175 * 4 and its momentum 1.5 * -4 at the start of epoch 1, and again.
    assert rows[1][0] == [[0.0, 0.0], [2.0, pytest.approx(3.7)]]
    assert rows[1][1] == rows[2][1] == [[0.0, 0.0], [0.0, -6.0]]
    assert rows[2][0] == [[0.0, 0.0], [0.0, rows[1][0][1][1]]]


# On a model with running statistics.


class Scheduled(Steady):
    """A learning rate that falls by every step of a round."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = CosineAnnealingLR(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def masked(point: dict[str, Any], module: Any, masks: Any) -> dict[str, Any]:
    """The state with zeros for pruned weights and their moments."""
    point = copy.deepcopy(point)
    for index, (name, _) in enumerate(module.named_parameters()):
        if name in masks:
            point["parameters"][name][~masks[name]] = 0
            for moment in point["optimizers"][0]["state"].get(index, {}).values():
                if moment.shape == masks[name].shape:
                    moment[~masks[name]] = 0
    return point


@pytest.mark.parametrize("rewind_epoch", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_event_comes_back_to_the_same_state(optimizer, rewind_epoch):
    schedule = Rewinding(rounds=3, epochs_per_round=2, rewind_epoch=rewind_epoch)
    callback = pruner(sparsity=0.8, criterion=Magnitude(), schedule=schedule, min_density=0.0)
    module, before, after, masks = Scheduled(optimizer), Look(), Look(), []

    class KeepMasks(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            masks.append(callback.masks)

    fit(module, before, callback, after, KeepMasks(), max_epochs=6 + rewind_epoch)
    point = before.seen[rewind_epoch]
    events = [rewind_epoch + 2 * index for index in range(3)]
    assert [event["epoch"] for event in callback.events] == events
    for epoch in events:
        assert_same(after.seen[epoch], masked(point, module, masks[epoch]))
        trained = {name: before.seen[epoch]["parameters"][name].abs() for name in masks[epoch]}
        kept = torch.cat([trained[name][mask] for name, mask in masks[epoch].items()])
        pruned = torch.cat([trained[name][~mask] for name, mask in masks[epoch].items()])
        assert kept.min() >= pruned.max()  # by the weights as trained
    assert not torch.equal(before.seen[events[1]]["buffers"]["camera.1.running_mean"], torch.zeros(8))
    # 0.2^(1/3) = 0.585 and 0.2^(2/3) = 0.342 of 120 weights, then exactly 0.2.
    assert [masks[epoch].num_kept for epoch in events] == [70, 41, 24]
    assert shrank(masks[events[2]], masks[events[1]])
    assert shrank(masks[events[1]], masks[events[0]])
    assert num_zeros(module) == 96


def test_the_last_round_is_the_training_of_the_ticket_alone():
    module, callback = Scheduled(), pruner(sparsity=0.8, schedule=Rewinding(rounds=3, epochs_per_round=2))
    ran = fit(module, callback, max_epochs=6)
    alone, ticket = Scheduled(), pruner(sparsity=0.8, schedule=OneShot(0))
    callback.masks.apply_(alone)
    ticket.load_state_dict(callback.state_dict())
    again = fit(alone, ticket, max_epochs=2)
    assert_same(dict(alone.state_dict()), dict(module.state_dict()))
    assert_same(again.optimizers[0].state_dict(), ran.optimizers[0].state_dict())


def test_one_round_from_the_start_is_one_shot():
    module, callback = Scheduled(), pruner(schedule=Rewinding(rounds=1, epochs_per_round=3))
    ran = fit(module, callback)
    expected, other = Scheduled(), pruner(schedule=OneShot(0))
    assert_same(outcome(module, ran, callback), outcome(expected, fit(expected, other), other))


@pytest.mark.parametrize("criterion", [Random(), short()], ids=["Random", "AlterEva"])
def test_any_criterion_rewinds(criterion):
    module, before, after = Steady(), Look(), Look()
    callback = pruner(criterion=criterion, schedule=Rewinding(rounds=2, epochs_per_round=1))
    fit(module, before, callback, after, max_epochs=2)
    for part in ("buffers", "optimizers"):
        assert_same(after.seen[1][part], before.seen[0][part])
    assert num_zeros(module) == 60


def test_manual_optimization_with_two_optimizers():
    before, after = Look(), Look()
    callback = pruner(criterion=Magnitude(), schedule=Rewinding(rounds=2, epochs_per_round=1, rewind_epoch=1))
    fit(Manual(), before, callback, after, max_epochs=3)
    steps = [[float(s["step"]) for s in seen["optimizers"][1]["state"].values()] for seen in after.seen]
    assert steps == [[], [4.0] * 4, [4.0] * 4]
    assert_same(after.seen[2]["buffers"], before.seen[1]["buffers"])


def test_fast_dev_run_prunes_once():
    callback = pruner(criterion=Magnitude(), schedule=Rewinding(rounds=3, epochs_per_round=4, rewind_epoch=2))
    fit(Fusion(), callback, fast_dev_run=True)
    assert [(event["epoch"], event["sparsity"]) for event in callback.events] == [(0, 0.5)]


# Checkpoints.

SCHEDULES = {
    "from_the_start": Rewinding(rounds=3, epochs_per_round=2),
    "early_epoch": Rewinding(rounds=3, epochs_per_round=2, rewind_epoch=1),
}


def full(module: Any, ran: Any, callback: Any) -> dict[str, Any]:
    schedulers = [config.scheduler.state_dict() for config in ran.lr_scheduler_configs]
    return {**outcome(module, ran, callback), "schedulers": schedulers}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_after_any_epoch_is_not_stopping(optimizer, schedule, tmp_path):
    module, callback = Scheduled(optimizer), pruner(sparsity=0.8, schedule=schedule)
    epochs = schedule.rewind_epoch + 6
    ran = fit(module, callback, checkpoints(tmp_path), max_epochs=epochs, enable_checkpointing=True)
    expected = full(module, ran, callback)
    assert [event["epoch"] for event in callback.events] == [schedule.rewind_epoch + k for k in (0, 2, 4)]
    held = []
    for epoch in range(epochs - 1):
        state = torch.load(at(tmp_path, epoch), weights_only=True)["callbacks"][KEY]
        held.append(state["rewind_point"] is not None)
        again, fresh = Scheduled(optimizer), pruner(sparsity=0.8, schedule=schedule)
        went_on = resumed(at(tmp_path, epoch), again, fresh, max_epochs=epochs)
        assert_same(full(again, went_on, fresh), expected)
    # Nothing before the rewind point, and nothing after the last event.
    assert held == [False] * schedule.rewind_epoch + [True] * 4 + [False]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
def test_resuming_after_any_step_is_not_stopping(tmp_path):
    x, y = dataset(8).tensors
    same = TensorDataset(x.repeat(4, 1), y.repeat(4, 1))  # Lightning restarts the loader of an epoch

    def made() -> tuple[Any, Any]:
        schedule = Rewinding(rounds=2, epochs_per_round=1, rewind_epoch=1)
        return Scheduled("sgd"), pruner(sparsity=0.8, schedule=schedule)

    module, callback = made()
    saved = checkpoints(tmp_path, every_n_train_steps=1)
    ran = fit(module, callback, saved, train=DataLoader(same, 8), max_epochs=3, enable_checkpointing=True)
    expected = full(module, ran, callback)
    paths = list(tmp_path.iterdir())
    assert len(paths) == 12
    for path in paths:
        again, fresh = made()
        went_on = resumed(path, again, fresh, train=DataLoader(same, 8), max_epochs=3)
        assert_same(full(again, went_on, fresh), expected)


def test_a_run_that_begins_after_the_rewind_point_is_refused(tmp_path):
    fit(Steady(), checkpoints(tmp_path), max_epochs=2, enable_checkpointing=True)
    callback = pruner(schedule=Rewinding(rounds=3, epochs_per_round=2, rewind_epoch=1))
    with pytest.raises(ValueError, match="rewinds to the start of epoch 1, but this run is at epoch 2"):
        resumed(at(tmp_path, 1), Steady(), callback, max_epochs=7)
    later = pruner(schedule=Rewinding(rounds=2, epochs_per_round=2, rewind_epoch=2))
    module = Steady()
    resumed(at(tmp_path, 1), module, later, max_epochs=6)
    assert [event["epoch"] for event in later.events] == [2, 4]
    assert num_zeros(module) == 60


def test_another_rewind_epoch_on_resume_is_refused(tmp_path):
    schedule = Rewinding(rounds=3, epochs_per_round=2)
    fit(Steady(), pruner(schedule=schedule), checkpoints(tmp_path), max_epochs=5, enable_checkpointing=True)
    callback = pruner(schedule=Rewinding(rounds=3, epochs_per_round=1, rewind_epoch=1))
    with pytest.raises(ValueError, match="rewinds to the start of epoch 1, but this run is at epoch 2"):
        resumed(at(tmp_path, 1), Steady(), callback, max_epochs=5)


def test_a_schedule_without_rewinding_ignores_the_point(tmp_path):
    schedule = Rewinding(rounds=2, epochs_per_round=2)
    fit(Steady(), pruner(schedule=schedule), checkpoints(tmp_path), max_epochs=3, enable_checkpointing=True)
    look, callback = Look(), pruner(schedule=OneShot(2))
    built = trainer(callback, look, max_epochs=4)
    built.fit(Steady(), loader(), loader(seed=1), ckpt_path=at(tmp_path, 1))
    steps = [float(state["step"]) for state in look.seen[-1]["optimizers"][0]["state"].values()]
    assert set(steps) == {12.0}
    assert callback.state_dict()["rewind_point"] is None


def test_a_second_fit_rewinds_to_what_it_was_given():
    module, callback = (
        Steady(),
        pruner(criterion=Magnitude(), schedule=Rewinding(rounds=2, epochs_per_round=1)),
    )
    fit(module, callback, max_epochs=2)
    given = {name: value.clone() for name, value in module.state_dict().items()}
    look = Look()
    callback.sparsity = 0.8
    fit(module, callback, look, max_epochs=2)
    assert num_zeros(module) == 96
    assert_same(look.seen[1]["buffers"], {n: v for n, v in given.items() if n in look.seen[1]["buffers"]})
    for name, mask in callback.masks.items():
        assert torch.equal(look.seen[1]["parameters"][name][mask], given[name][mask])


# The point itself.


def nets(make_scheduler: Any) -> tuple[Any, Any]:
    """A net, and what of a Trainer a rewind point looks at."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    config = SimpleNamespace(scheduler=make_scheduler(optimizer))
    return net, SimpleNamespace(current_epoch=5, optimizers=[optimizer], lr_scheduler_configs=[config])


def train(net: Any, run: Any, steps: int) -> list[Any]:
    """Rates and weights after each step."""
    (optimizer,), scheduler, rows = run.optimizers, run.lr_scheduler_configs[0].scheduler, []
    for step in range(steps):
        loss = net(torch.linspace(-1, 1, 8).view(4, 2) * (step + 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rows.append((optimizer.param_groups[0]["lr"], {n: v.clone() for n, v in net.state_dict().items()}))
    return rows


MAKERS = {
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=20),
    "MultiStepLR": lambda o: MultiStepLR(o, [2, 4, 4]),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), StepLR(o, 2)], [4]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


@pytest.mark.parametrize("make_scheduler", MAKERS.values(), ids=MAKERS)
def test_a_point_survives_a_file_and_is_used_again_and_again(make_scheduler, tmp_path):
    net, run = nets(make_scheduler)
    train(net, run, 3)
    point = RewindPoint.take(run, net)
    torch.save(point.state_dict(), tmp_path / "point.pt")
    loaded = RewindPoint(**torch.load(tmp_path / "point.pt", weights_only=True))
    expected = train(net, run, 5)
    for each in (point, loaded, point, loaded):
        each.restore_(run, net)
        assert_same(train(net, run, 5), expected)
    assert point.epoch == loaded.epoch == 5


def test_a_point_shares_no_memory_with_the_run():
    net, run = nets(lambda o: StepLR(o, 1))
    train(net, run, 1)
    point = RewindPoint.take(run, net)
    before = copy.deepcopy(point.state_dict())
    train(net, run, 1)
    assert_same(point.state_dict(), before)
    point.restore_(run, net)
    train(net, run, 2)
    assert_same(point.state_dict(), before)


def _wider(net: Any, run: Any) -> None:
    net[2] = nn.Linear(3, 2)


def _more_buffers(net: Any, run: Any) -> None:
    net.register_buffer("extra", torch.zeros(1))


def _no_scheduler(net: Any, run: Any) -> None:
    run.lr_scheduler_configs = []


def _two_optimizers(net: Any, run: Any) -> None:
    run.optimizers = run.optimizers * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, r"2.bias \(now \(2,\), then \(1,\)\), 2.weight \(now \(2, 3\), then \(1, 3\)\)"),
        (_more_buffers, r"extra \(now \(1,\), then None\)"),
        (_no_scheduler, r"number of schedulers \(now 0, then 1\)"),
        (_two_optimizers, r"number of optimizers \(now 2, then 1\)"),
    ],
)
def test_a_point_of_another_run_is_refused_and_changes_nothing(change, message):
    net, run = nets(lambda o: StepLR(o, 1))
    point = RewindPoint.take(run, net)
    train(net, run, 1)
    change(net, run)
    before = copy.deepcopy(dict(net.state_dict()))
    with pytest.raises(
        ValueError, match="cannot rewind to epoch 5, these have changed since then: " + message
    ):
        point.restore_(run, net)
    assert_same(dict(net.state_dict()), before)


def test_a_damaged_point_is_refused():
    net, run = nets(lambda o: StepLR(o, 1))
    point = RewindPoint.take(run, net).state_dict()
    del point["buffers"]
    with pytest.raises(ValueError, match=r"state.rewind_point must hold \['buffers', 'epoch'"):
        pruner().load_state_dict({**pruner().state_dict(), "rewind_point": point})


# Time.


def test_scoring_seconds_are_those_of_the_events_of_this_process():
    class Slow(Magnitude):
        def score(self, calibration: Any) -> Any:
            time.sleep(0.05)
            return super().score(calibration)

    callback = pruner(criterion=Slow(), schedule=Rewinding(rounds=2, epochs_per_round=1))
    assert callback.scoring_seconds == 0
    started = time.perf_counter()
    fit(Fusion(), callback, max_epochs=2)
    assert 0.1 <= callback.scoring_seconds < time.perf_counter() - started
    fresh = pruner()
    fresh.load_state_dict(callback.state_dict())
    assert fresh.scoring_seconds == 0
    with pytest.raises(AttributeError):
        callback.scoring_seconds = 1.0
