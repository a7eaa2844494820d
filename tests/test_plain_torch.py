"""`prune` and `hold`: the callback's two acts in a training loop of one's own."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn

import altermoma_pl.score.decision as decision
from altermoma_pl import (
    SNIP,
    AlterEva,
    Channel,
    Linear,
    Magnitude,
    Masks,
    OneShot,
    Random,
    SynFlow,
    Wanda,
    hold,
    prune,
    slim,
)
from tests.helpers.channel_models import Towers, channel_pruner
from tests.helpers.lightning_models import MODALITIES, Fusion, fit, loader, nonzero_pruned, pruner, short
from tests.helpers.models import BRANCHES, Scalar, scalar_batch, snapshot, squared_error

TRAINING, HELD_OUT = list(loader()), list(loader(seed=1))
NAMES = ("camera.weight", "lidar.weight", "fusion.weight")


def loss_fn(model, batch):
    return model.loss(batch)


def pruned(model, **options):
    """With the batches, the seed and the options of the callback that `pruner` makes."""
    defaults = {"sparsity": 0.5, "criterion": short(), "modalities": MODALITIES}
    return prune(model, loss_fn, HELD_OUT, TRAINING, **{**defaults, **options})


def scalars(**options):
    batches = [scalar_batch(1, 1, 0)]
    defaults = {"modalities": BRANCHES, "criterion": Magnitude(), "min_density": 0.0}
    return prune(Scalar(), squared_error, batches, batches, **{**defaults, **options})


def kept(masks):
    return [masks[name].flatten().tolist() for name in NAMES]


def test_by_hand():
    """Of the weights 2, 3, 1 and -1 the two largest stay; of equal ones the earlier."""
    assert kept(scalars(sparsity=0.5)) == [[True], [True], [False, False]]
    assert kept(scalars(sparsity=0.25)) == [[True], [True], [True, False]]
    shares = {"camera": 0.0, "lidar": 0.0, "shared": 0.5}
    assert kept(scalars(sparsity=shares, scope="modality")) == [[True], [True], [True, False]]
    masks = scalars(sparsity=0.5, prunable=["!fusion"])
    assert {name: mask.item() for name, mask in masks.items()} == {
        "camera.weight": False,
        "lidar.weight": True,
    }


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Fusion, {}),
        (Fusion, {"criterion": SNIP(2)}),
        (Fusion, {"criterion": Random(), "scope": "layer", "seed": 5}),
        (Fusion, {"criterion": SynFlow(num_iterations=3)}),
        (Fusion, {"criterion": Wanda(2), "scope": "row"}),
        (Fusion, {"criterion": short(beta="auto"), "min_density": 0.2}),
        (Towers, {"granularity": Channel(round_to=2)}),
        (Towers, {"granularity": Channel(target="flops", round_to=1), "criterion": Magnitude()}),
    ],
)
def test_masks_are_those_of_the_callback(model, options):
    """An event before the first step of `Trainer.fit` sees the same weights and batches."""
    module = model()
    before = snapshot(module)
    masks = pruned(module, **options)
    assert snapshot(module) == before
    callback = pruner(schedule=OneShot(0), store_components=False, **options)
    fit(model(), callback, max_epochs=1)
    assert masks == callback.masks
    assert masks.sparsity > 0


def test_an_error_leaves_the_model_as_it_was():
    module = Fusion()
    before = snapshot(module)

    def failing(model, batch):
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError):
        prune(module, failing, HELD_OUT, TRAINING, MODALITIES)
    assert snapshot(module) == before


def trained(module, masks, num_steps=4, optimizers=None):
    """Steps with momentum and weight decay, which would bring pruned weights back."""
    made = optimizers or [torch.optim.AdamW(module.parameters(), 0.05, weight_decay=0.1)]
    for batch in TRAINING[:num_steps]:
        for optimizer in made:
            optimizer.zero_grad()
        module.loss(batch).backward()
        for optimizer in made:
            optimizer.step()
            if masks is not None:
                assert nonzero_pruned(module, masks) == 0
    return made


def test_hold_keeps_zeros_while_optimizers_run_and_lets_go():
    module = Fusion()
    masks = pruned(module)
    optimizers = [
        torch.optim.SGD(module.camera.parameters(), 0.05, momentum=0.9),
        torch.optim.AdamW([*module.lidar.parameters(), *module.head.parameters()], 0.05),
    ]
    trained(module, None, optimizers=optimizers)
    assert nonzero_pruned(module, masks) > 0
    with hold(module, masks, *optimizers):
        assert nonzero_pruned(module, masks) == 0
        moment = optimizers[0].state[module.camera[0].weight]["momentum_buffer"]
        assert not moment[~masks["camera.0.weight"]].any()
        trained(module, masks, optimizers=optimizers)
    assert nonzero_pruned(module, masks) == 0
    trained(module, None, optimizers=optimizers)
    assert nonzero_pruned(module, masks) > 0


def test_hold_holds_after_half_a_step():
    module = Fusion()
    masks = pruned(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def spoil(*_):
        nn.init.ones_(module.head.weight)
        raise KeyboardInterrupt

    optimizer.register_step_post_hook(spoil)
    with pytest.raises(KeyboardInterrupt), hold(module, masks, optimizer):  # noqa: PT012
        module.loss(TRAINING[0]).backward()
        optimizer.step()
    assert nonzero_pruned(module, masks) == 0


def test_gradually():
    module, masks, schedule = Fusion(), None, Linear(start=0, end=2)
    counts = []
    for epoch in range(4):
        if schedule.is_due(epoch):
            masks = pruned(module, sparsity=schedule.sparsity_at(epoch, 0.9), masks=masks)
        optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
        with hold(module, masks, optimizer):
            trained(module, masks, optimizers=[optimizer])
        counts.append({name: mask.clone() for name, mask in masks.items()})
    assert [sum(int(m.sum()) for m in each.values()) for each in counts] == [84, 48, 12, 12]
    for earlier, later in itertools.pairwise(counts):
        assert all((earlier[name] | ~later[name]).all() for name in earlier)


def test_channels_are_held_and_removed():
    module = Towers()
    masks = pruned(module, granularity=Channel(round_to=2))
    optimizer = torch.optim.AdamW(module.parameters(), 0.05)
    with hold(module, masks, optimizer):
        trained(module, masks, optimizers=[optimizer])
    smaller = slim(module, masks, TRAINING[0][:1])
    assert sum(kept for kept, _ in smaller.widths.values()) <= 12
    callback = channel_pruner(schedule=OneShot(0))
    fit(Towers(), callback, max_epochs=1)
    assert callback.masks == masks


def test_a_copy_of_the_masks_is_placed_and_the_given_ones_stay():
    module = Fusion()
    masks = pruned(module)
    before = copy.deepcopy(masks)
    with hold(module, masks, torch.optim.SGD(module.parameters(), 0.1)):
        pass
    assert masks == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be a share of zeros in [0, 1), got 1.0"),
        ({"granularity": "rows"}, ValueError, "granularity must be 'weight', 'channel'"),
        ({"granularity": "channel", "criterion": SynFlow()}, ValueError, "SynFlow scores single weights"),
        ({"modalities": {"camera": "camera"}}, ValueError, "at least two modalities are needed"),
        ({"modalities": {"camera": "camera", "lidar": "radar"}}, ValueError, "'radar' matches no parameter"),
        ({"masks": Masks({"x": torch.ones(1, dtype=torch.bool)})}, ValueError, "'x' does not exist"),
    ],
)
def test_bad_options_are_told(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pruned(Fusion(), **options)


def test_batches_that_can_be_read_once_are_refused():
    batches = TRAINING
    with pytest.raises(TypeError, match="a generator only once: give a list or a loader"):
        prune(Fusion(), loss_fn, iter(batches), batches, MODALITIES)
    with pytest.raises(TypeError, match="a generator only once"):
        prune(Fusion(), loss_fn, batches, (batch for batch in batches), MODALITIES)


def test_no_batches_are_told():
    with pytest.raises(ValueError, match="the probe loader gives no batch"):
        prune(Fusion(), loss_fn, [], TRAINING, MODALITIES)
    with pytest.raises(ValueError, match="there is no probe batch: at least one is needed to follow"):
        prune(Towers(), loss_fn, [], TRAINING, MODALITIES, granularity="channel")


def test_masks_of_another_model_are_not_held():
    with (
        pytest.raises(ValueError, match="does not exist in Scalar"),
        hold(Scalar(), pruned(Fusion()), torch.optim.SGD(Scalar().parameters(), 0.1)),
    ):
        raise AssertionError("not reached")


def test_a_criterion_scores_what_the_driver_decides_on(monkeypatch):
    """One decision for both: what is mended in it is mended for the callback and for plain torch."""
    seen = []
    original = decision.decide
    monkeypatch.setattr("altermoma_pl.plain_torch.decide", lambda *a: seen.append(a) or original(*a))
    pruned(Fusion(), criterion=AlterEva(num_probe_batches=1, num_reactivation_steps=0))
    assert len(seen) == 1
