"""beta="auto": the beta whose masks leave the lowest loss."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from altermoma_pl import AlterEva, Components, Linear, OneShot, Rewinding, choose_beta, top_k
from altermoma_pl.callback.state import PruningState
from altermoma_pl.model.contexts import noise_free
from altermoma_pl.score.decision import CANDIDATES, Decision
from tests.helpers.lightning_models import Fusion, assert_same, fit, num_zeros, pruner, short
from tests.helpers.masks import shrank
from tests.helpers.models import calibration, random_batches, snapshot, squared_error, two_tower
from tests.helpers.resuming import Steady, at, checkpoints, outcome, resumed

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., .*ModelCheckpoint")

# By hand. Of four weights one is pruned, the lowest D - beta R:
#   beta      camera 0, 1      lidar 0, 1      pruned
#   0           3    4           5   6         camera 0
#   0.25        3    2.5         5   3.25      camera 1
#   0.5         3    1           5   0.5       lidar 1
#   1           3   -2           5  -5         lidar 1
#   2           3   -8           5 -16         lidar 1
D = {"camera.weight": [[3.0, 4.0]], "lidar.weight": [[5.0, 6.0]]}
R = {"lidar": {"camera.weight": [[0.0, 6.0]]}, "camera": {"lidar.weight": [[0.0, 11.0]]}}
SUBTRACT = AlterEva(
    alpha=1.0,
    beta="auto",
    magnitude_share=0.0,
    combination="subtract",
    redundancy_level="weight",
    num_probe_batches=2,
)


class Four(nn.Module):
    def __init__(self):
        super().__init__()
        self.camera, self.lidar = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)


def components():
    return Components(
        {name: torch.tensor(value) for name, value in D.items()},
        {m: {name: torch.tensor(value) for name, value in own.items()} for m, own in R.items()},
        {"camera.weight": "camera", "lidar.weight": "lidar"},
        {},
        {name: torch.tensor(value) for name, value in D.items()},
    )


def costly(costs):
    """A loss that knows what each zero costs: of camera 0, camera 1, lidar 1."""

    def loss(model, batch):
        zeros = torch.cat([model.camera.weight == 0, model.lidar.weight == 0], 1)[0]
        assert int(zeros.sum()) == 1
        return batch * torch.tensor([costs[0], costs[1], 7.0, costs[2]])[zeros].sum()

    return loss


def choose(costs, criterion=SUBTRACT):
    made = calibration(Four(), loss_fn=costly(costs), probe_batches=[1.0, 3.0])
    return choose_beta(criterion, components(), made, lambda scores: top_k(scores, 0.25))


@pytest.mark.parametrize(
    ("costs", "beta"),
    [
        ((3.0, 1.0, 2.0), 0.25),
        ((3.0, 2.0, 1.0), 0.5),  # and 1 and 2: the same masks, so the smallest
        ((1.0, 2.0, 3.0), 0.0),
        ((1.0, 1.0, 1.0), 0.0),
        ((2.0, 1.0, 1.0), 0.25),
        ((math.inf, 2.0, 1.0), 0.5),
        ((math.nan, 1.0, math.inf), 0.25),
        ((1.0, math.nan, math.nan), 0.0),
    ],
)
def test_by_hand(costs, beta):
    chosen, losses = choose(costs)
    assert chosen == dataclasses.replace(SUBTRACT, beta=beta)
    first, second, third = (2 * c if math.isfinite(c) else math.inf for c in costs)  # the mean of 1 and 3
    assert losses == {0.0: first, 0.25: second, 0.5: third, 1.0: third, 2.0: third}


def test_without_any_finite_loss_it_is_zero_and_a_warning():
    with pytest.warns(UserWarning, match="the loss of the pruned model is not finite for any beta: taking 0"):
        chosen, losses = choose((math.nan, math.inf, -math.inf))
    assert chosen.beta == 0
    assert set(losses.values()) == {math.inf}


@pytest.mark.parametrize("combination", ["discount", "subtract"])
def test_candidates_begin_with_zero_and_grow(combination):
    candidates = CANDIDATES[combination]
    assert candidates[0] == 0
    assert sorted(set(candidates)) == list(candidates)
    named = "0, 1, 2, 3, 4" if combination == "discount" else "0, 0.25, 0.5, 1, 2"
    assert ", ".join(f"{beta:g}" for beta in candidates) == named
    assert named in " ".join(AlterEva.__doc__.split())


def test_the_criterions_own_beta_does_not_matter():
    costs = (3.0, 1.0, 2.0)
    assert choose(costs, dataclasses.replace(SUBTRACT, beta=-3.0)) == choose(costs)


# On a net with norm layers and dropout.

SMALL = {"num_probe_batches": 3, "num_reactivation_steps": 4, "learning_rate": 0.05}
CRITERIA = {
    "discount": AlterEva(beta="auto", **SMALL),
    "subtract": dataclasses.replace(SUBTRACT, normalization="mean", **SMALL),
}
every_criterion = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)


def half(scores):
    return top_k(scores, 0.6)


@every_criterion
@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_zero_and_losses_are_those_of_the_pruned_model(criterion, seed):
    batches = random_batches(3, seed=seed + 10)
    made = calibration(two_tower(seed), probe_batches=batches)
    measured = criterion.components(made)
    chosen, losses = choose_beta(criterion, measured, made, half)
    for beta, loss in losses.items():
        model = copy.deepcopy(made.model)
        half(dataclasses.replace(criterion, beta=beta).combine(measured)).apply_(model)
        with noise_free(model), torch.no_grad():
            expected = sum(float(squared_error(model, batch)) for batch in batches) / 3
        assert loss == pytest.approx(expected, rel=1e-6)
    assert losses[chosen.beta] == min(losses.values()) <= losses[0.0]


def test_it_is_not_always_the_same_beta():
    found = set()
    for seed in range(8):
        made = calibration(two_tower(seed), probe_batches=random_batches(3, seed=seed + 10))
        criterion = CRITERIA["subtract"]
        chosen, _ = choose_beta(criterion, criterion.components(made), made, half)
        found.add(chosen.beta)
    assert len(found) > 1


@every_criterion
@pytest.mark.parametrize("noise", ["suppressed", "as_is"])
def test_the_model_is_left_as_it_was_also_after_an_exception_at_any_batch(criterion, noise):
    criterion = dataclasses.replace(criterion, noise=noise)
    measured = criterion.components(calibration())
    total = 3 * len(CANDIDATES[criterion.combination])
    for fatal in range(total + 1):
        calls = itertools.count()

        def loss(model, batch, calls=calls, fatal=fatal):
            result = squared_error(model, batch)
            if next(calls) == fatal:
                raise KeyboardInterrupt
            return result

        made = calibration(loss_fn=loss)
        made.model.head[1].weight.grad = torch.ones(1, 8)
        before = snapshot(made.model)
        if fatal < total:
            with pytest.raises(KeyboardInterrupt):
                choose_beta(criterion, measured, made, half)
        else:
            choose_beta(criterion, measured, made, half)
        assert next(calls) == min(fatal + 1, total)
        assert snapshot(made.model) == before


def test_an_error_of_the_masks_leaves_the_model_as_it_was():
    criterion, made = CRITERIA["discount"], calibration()
    measured, before = criterion.components(made), snapshot(made.model)
    with pytest.raises(ValueError, match="got 2"):
        choose_beta(criterion, measured, made, lambda scores: top_k(scores, 2))
    assert snapshot(made.model) == before


@every_criterion
def test_earlier_masks_hold(criterion):
    model = two_tower()
    earlier = top_k({n: w.detach().abs() for n, w in calibration(model).weights.items()}, 0.3)
    earlier.apply_(model)
    made, seen = calibration(model, masks=earlier), []

    def make_masks(scores):
        seen.append(top_k(scores, 0.6, within=earlier))
        return seen[-1]

    choose_beta(criterion, criterion.components(made), made, make_masks)
    assert len(seen) == 5
    assert all(shrank(masks, earlier) for masks in seen)


def test_progress_is_told():
    told = []
    made = calibration(progress=lambda *arguments: told.append(arguments))
    criterion = CRITERIA["discount"]
    measured = criterion.components(made)
    told.clear()
    choose_beta(criterion, measured, made, half)
    assert [phase for phase, done, _ in told if done == 0] == [f"beta {b}" for b in ("0", "1", "2", "3", "4")]


# The option.


def test_auto_needs_to_be_chosen():
    message = (
        "beta='auto' depends on the pruned model: choose_beta(criterion, components, calibration, make_masks)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SUBTRACT.combine(components())
    calls = itertools.count()
    made = calibration(loss_fn=lambda model, batch: next(calls))
    with pytest.raises(ValueError, match=re.escape(message)):
        SUBTRACT.score(made)
    assert next(calls) == 0


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="beta must be a number or 'auto', got 'best'"):
        AlterEva(beta="best")


def test_auto_does_not_excuse_alpha():
    with pytest.raises(ValueError, match=re.escape("got alpha=-1.0")):
        AlterEva(alpha=-1.0, beta="auto")
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        AlterEva(alpha=math.nan, beta="auto")


# In the callback.


@pytest.mark.parametrize("schedule", [Linear(0, 2), Rewinding(3, 1)], ids=["Linear", "Rewinding"])
def test_events_record_what_was_chosen(schedule, tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    callback = pruner(criterion=short(beta="auto"), sparsity=0.8, schedule=schedule)
    fit(Fusion(), callback, logger=logger, log_every_n_steps=1)
    assert len(callback.events) == 3
    printed = " ".join(capsys.readouterr().out.split())
    for event in callback.events:
        assert list(event["beta_losses"]) == ["0", "1", "2", "3", "4"]
        assert event["beta_losses"][f"{event['beta']:g}"] == min(event["beta_losses"].values())
        assert f", beta {event['beta']:g}: sparsity {event['sparsity']:.4f}" in printed
    assert json.loads(json.dumps(callback.events)) == callback.events
    with open(os.path.join(logger.log_dir, "metrics.csv")) as file:
        logged = [float(row["pruning/beta"]) for row in csv.DictReader(file) if row["pruning/beta"]]
    assert logged == [event["beta"] for event in callback.events]
    assert callback.criterion.beta == "auto"


@pytest.mark.parametrize("combination", ["discount", "subtract"])
def test_masks_are_those_of_the_beta_that_was_chosen(combination):
    criterion = short(beta="auto", combination=combination)
    callback, other = pruner(criterion=criterion), pruner()
    fit(Fusion(), callback)
    beta = callback.events[0]["beta"]
    other.criterion = dataclasses.replace(criterion, beta=beta)
    fit(Fusion(), other)
    assert callback.masks == other.masks
    assert_same(callback.components.state_dict(), other.components.state_dict())
    assert "beta" not in other.events[0]
    without_beta = {name: value for name, value in callback.events[0].items() if "beta" not in name}
    assert without_beta == other.events[0]


def test_an_event_that_prunes_nothing_changes_nothing():
    module, plain = Fusion(), Fusion()
    callback = pruner(criterion=short(beta="auto"), sparsity=0.0)
    ran, expected = fit(module, callback), fit(plain)
    assert callback.events[0]["beta"] == 0  # all masks are alike
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))
    assert_same(ran.optimizers[0].state_dict(), expected.optimizers[0].state_dict())
    assert dict(ran.callback_metrics) == dict(expected.callback_metrics)


@pytest.mark.parametrize("schedule", [Linear(0, 2), Rewinding(2, 2)], ids=["Linear", "Rewinding"])
def test_resuming_is_not_stopping(schedule, tmp_path):
    def made():
        return Steady(), pruner(criterion=short(beta="auto"), sparsity=0.8, schedule=schedule)

    module, callback = made()
    ran = fit(module, callback, checkpoints(tmp_path), max_epochs=4, enable_checkpointing=True)
    expected = outcome(module, ran, callback)
    for epoch in range(3):
        again, fresh = made()
        went_on = resumed(at(tmp_path, epoch), again, fresh, max_epochs=4)
        assert_same(outcome(again, went_on, fresh), expected)
    assert num_zeros(module) == 96


def test_losses_that_are_not_finite_are_recorded_as_none():
    callback = pruner(schedule=OneShot(0))
    fit(Fusion(), callback, max_epochs=1)
    state = PruningState(group_of=dict.fromkeys(callback.masks, "all"))
    state.record(Decision(callback.masks, None, 0.5, {0.0: math.inf, 0.5: 1.5}), 0, 0, True)
    assert state.events[0]["beta_losses"] == {"0": None, "0.5": 1.5}
    assert "Infinity" not in json.dumps(state.state_dict()["events"])
