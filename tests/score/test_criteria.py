"""The contract of every criterion: a new subclass is tested before its author writes a test."""

import itertools
import re

import pytest
import torch
import torchmetrics
from torch import nn

from altermoma_pl import (
    SNIP,
    AlterEva,
    Calibration,
    Criterion,
    GraSP,
    Magnitude,
    Masks,
    ProsPr,
    Random,
    SynFlow,
    Taylor,
    Wanda,
    top_k,
)
from tests.helpers.models import (
    BRANCHES,
    INTERLEAVED,
    ORACLES,
    Aliased,
    Compiled,
    Dead,
    Geometry,
    Interleaved,
    Nested,
    TwoTower,
    calibration,
    concrete_subclasses,
    fill,
    linear,
    random_batches,
    scatter,
    snapshot,
    squared_error,
    two_tower,
)

CRITERIA = concrete_subclasses(Criterion)
SMALL = {"num_probe_batches": 3, "num_reactivation_steps": 4, "learning_rate": 0.05}
SETTINGS = {
    "default": AlterEva(**SMALL),
    "difference": AlterEva(**SMALL, estimator="difference", combination="subtract", normalization="mean"),
    "abs_of_mean": AlterEva(**SMALL, reduction="abs_of_mean"),
    "adam_as_is": AlterEva(**SMALL, optimizer="adam", noise="as_is"),
    "paper": AlterEva.paper(),
}
VARIANTS = {
    "finite_difference": GraSP(num_probe_batches=3, hessian="finite_difference"),
    "full_prospr": ProsPr(order="full", momentum=0.9, learning_rate=0.05),
    "synflow": SynFlow(num_iterations=3),
    "synflow_without_normalisation": SynFlow(num_iterations=1, density=0.3, normalize_heads=False),
}
MADE = [
    *((c.__name__, c()) for c in CRITERIA if c not in (AlterEva, SynFlow)),
    *SETTINGS.items(),
    *VARIANTS.items(),
]
every_criterion = pytest.mark.parametrize("criterion", [c for _, c in MADE], ids=[name for name, _ in MADE])
short_loaders = pytest.mark.filterwarnings("ignore:.* batches were asked for, the loader has")


def test_the_shipped_ones_are_found():
    baselines = {SNIP, GraSP, SynFlow, ProsPr, Taylor, Wanda}
    assert {AlterEva, Magnitude, Random} | baselines <= set(CRITERIA)


def traits():
    """Name -> how to make a calibration on a net with a trait of real projects."""

    def aliased():
        return calibration(Aliased(), **_batches((3, 3, 1)))

    def geometry():
        return calibration(Geometry())

    def interleaved():
        return calibration(Interleaved(), modalities=INTERLEAVED)

    def nested():
        modalities = {"camera": ["model.camera"], "lidar": ["model.lidar"]}
        return calibration(Nested(two_tower()), modalities=modalities)

    def compiled():
        model = two_tower()
        model.camera = Compiled(model.camera)
        return calibration(Compiled(model))

    def three():
        return calibration(
            Three(), modalities={n: [n] for n in ("camera", "lidar", "radar")}, **_batches((3, 2, 2, 1))
        )

    def pruned():
        model = two_tower()
        scores = {name: model.get_parameter(name).abs() for name in calibration(model).weights}
        masks = top_k(scores, 0.4)
        masks.apply_(model)
        return calibration(model, masks=masks)

    return {
        "two_tower": calibration,
        "aliased": aliased,
        "geometry": geometry,
        "dead": lambda: calibration(Dead()),
        "interleaved": interleaved,
        "nested": nested,
        "compiled": compiled,
        "three_modalities": three,
        "pruned": pruned,
        "half": lambda: calibration(two_tower().bfloat16(), loss_fn=half_error),
    }


def half_error(model, batch):
    return squared_error(lambda *inputs: model(*inputs).float(), _half(batch))


def _half(batch):
    *inputs, target = batch
    return (*(each.bfloat16() for each in inputs), target)


def _batches(sizes):
    return {
        "probe_batches": random_batches(3, 1, sizes),
        "training_batches": random_batches(4, 2, sizes),
    }


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.camera, self.lidar, self.radar = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.head = nn.Linear(6, 1)
        scatter(self)

    def forward(self, camera, lidar, radar):
        return self.head(torch.cat([self.camera(camera), self.lidar(lidar), self.radar(radar)], -1))


TRAITS = traits()


@every_criterion
@pytest.mark.parametrize("trait", TRAITS)
@short_loaders
def test_contract(criterion, trait):
    made = TRAITS[trait]()
    for index, parameter in enumerate(made.model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.grad = torch.full_like(parameter, 7.0)
    before = snapshot(_as_float(made.model))
    scores = criterion.score(made)
    assert snapshot(_as_float(made.model)) == before
    assert list(scores) == list(made.weights)
    for name, weight in made.weights.items():
        live = slice(None) if made.masks is None else made.masks[name]
        assert scores[name].shape == weight.shape
        assert scores[name].is_floating_point()
        assert not scores[name].requires_grad
        assert torch.isfinite(scores[name][live]).all()
    again = criterion.score(made)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert top_k(scores, 0.5, within=made.masks).num_kept == made_half(made)


def made_half(made):
    total = sum(weight.numel() for weight in made.weights.values())
    return total - round(0.5 * total)


def _as_float(model):
    """Numpy knows no bfloat16: its bits are kept by float32."""
    return model if next(model.parameters()).dtype != torch.bfloat16 else _Upcast(model)


class _Upcast:
    """What `snapshot` reads of a model, in float32."""

    def __init__(self, model):
        self.model = model

    def named_modules(self):
        return ()

    def named_parameters(self):
        for name, parameter in self.model.named_parameters():
            upcast = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            upcast.grad = None if parameter.grad is None else parameter.grad.float()
            yield name, upcast


@every_criterion
@short_loaders
def test_scores_do_not_depend_on_the_generators_or_what_ran_before(criterion):
    made = calibration()
    torch.manual_seed(1)
    first = criterion.score(made)
    torch.manual_seed(2)
    made.model.zero_grad()
    second = criterion.score(calibration())
    assert all(torch.equal(first[name], second[name]) for name in first)


class _Stop(Exception):  # noqa: N818
    """Raised by a loss function in the middle of scoring."""


def count_losses(criterion, made):
    calls = itertools.count()

    def counted(model, batch):
        next(calls)
        return squared_error(model, batch)

    made.loss_fn = counted
    criterion.score(made)
    return next(calls)


@every_criterion
@short_loaders
def test_an_exception_at_any_batch_leaves_the_model_as_it_was(criterion):
    total = count_losses(criterion, calibration())
    for fatal in range(total):
        made = calibration()
        made.model.head[1].weight.grad = torch.ones(1, 8)
        calls = itertools.count()

        def loss(model, batch, calls=calls, fatal=fatal):
            result = squared_error(model, batch)
            if next(calls) == fatal:
                raise _Stop
            return result

        made.loss_fn = loss
        before = snapshot(made.model)
        with pytest.raises(_Stop):
            criterion.score(made)
        assert snapshot(made.model) == before


def test_alter_eva_takes_all_its_batches():
    # DeCI on 3 batches; for each of two modalities 3 before, 4 steps, 3 after.
    assert count_losses(SETTINGS["default"], calibration()) == 3 + 2 * (3 + 4 + 3)
    assert count_losses(Magnitude(), calibration()) == 0


@every_criterion
@short_loaders
def test_a_model_that_changes_its_own_state_is_brought_back(criterion):
    class Restless(TwoTower):
        def __init__(self):
            super().__init__()
            self.metric = torchmetrics.MeanMetric()
            self.steps = 0

        def forward(self, image, points):
            self.steps += 1
            self.metric.update(float(self.steps))
            self.eval() if self.steps % 2 else self.train()
            return super().forward(image, points)

    made = calibration(scatter(Restless()))
    made.model.camera[1].eval()
    before = snapshot(made.model)
    criterion.score(made)
    assert snapshot(made.model) == before
    assert made.model.steps == 0
    assert made.model.metric.update_count == 0


def test_magnitude_by_hand():
    oracle = ORACLES["magnitude"]
    model = nn.ModuleDict(
        {"camera": linear(ORACLES["_net_A"]["W1"]), "lidar": linear(ORACLES["_net_A"]["W2"])}
    )
    scores = Magnitude().score(calibration(model))
    assert scores["camera.weight"].tolist() == oracle["W1"]
    assert scores["lidar.weight"].tolist() == oracle["W2"]


def test_random_depends_on_the_seed_only():
    first, second = (Random().score(calibration(seed=seed)) for seed in (0, 1))
    other_net = Random().score(calibration(fill(TwoTower())))
    assert all(torch.equal(first[name], other_net[name]) for name in first)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    draws = torch.cat([score.flatten() for score in Random().score(calibration(TwoTower(400))).values()])
    assert abs(float(draws.mean())) < 0.05
    assert abs(float(draws.std()) - 1) < 0.05


@pytest.mark.parametrize("cls", CRITERIA)
def test_documented_comparable_and_frozen(cls):
    assert cls() == cls()
    assert cls.__doc__
    assert "score" in vars(cls)


def test_a_calibration_resolves_its_groups():
    made = calibration(prunable=["!head"])
    assert list(made.weights) == ["camera.0.weight", "lidar.0.weight"]
    assert made.group_of == {"camera.0.weight": "camera", "lidar.0.weight": "lidar"}
    assert made.weights["camera.0.weight"] is made.model.camera[0].weight
    assert list(made.groups) == ["camera", "lidar", "shared"]
    assert list(calibration(prunable=["*.0.bias"]).weights)[1] == "camera.0.bias"


def test_masks_must_fit():
    with pytest.raises(ValueError, match=re.escape("masked parameter 'x' does not exist in TwoTower")):
        calibration(masks=Masks({"x": torch.ones(1, dtype=torch.bool)}))
    one = Masks.dense({"camera.0.weight": torch.ones(4, 3)})
    message = "masks and prunable weights differ in ['head.1.weight', 'lidar.0.weight']"
    with pytest.raises(ValueError, match=re.escape(message)):
        calibration(masks=one)


def constant(value):
    return lambda model, batch: value


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (constant(None), TypeError, "the loss of probe batch 0 must be a tensor, got NoneType"),
        (constant({"loss": 1}), TypeError, "the loss of probe batch 0 must be a tensor, got dict"),
        (constant(torch.ones(2)), ValueError, "the loss of probe batch 0 must be a scalar, got shape (2,)"),
        (
            constant(torch.tensor(float("nan"))),
            ValueError,
            "the loss of probe batch 0 is nan: check the batch, or lower the learning rate of the criterion",
        ),
        (
            constant(torch.tensor(1.0)),
            ValueError,
            "the loss of training batch 0 has no gradient: it is detached, computed without gradients",
        ),
        (
            lambda model, batch: (
                (model(*batch[:2]).sum() * 0 + 1e-45).sqrt().sqrt() * 0
                + model.camera[0].weight.sub(model.camera[0].weight.detach()).abs().sqrt().sum()
            ),
            ValueError,
            "the gradient of 'camera.0.weight' on training batch 0 is not finite",
        ),
    ],
)
def test_impossible_losses_are_explained(loss_fn, error, message):
    made = calibration(loss_fn=loss_fn)
    before = snapshot(made.model)
    with pytest.raises(error, match=re.escape(message)):
        SETTINGS["default"].score(made)
    assert snapshot(made.model) == before


def test_a_loss_of_one_element_is_a_scalar():
    made = calibration(loss_fn=lambda model, batch: squared_error(model, batch).view(1, 1))
    assert list(SETTINGS["default"].score(made)) == list(made.weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_batches": []}, "the probe loader gives no batch: at least one is needed to score weights"),
        (
            {"training_batches": []},
            "the training loader gives no batch: at least one is needed to score weights",
        ),
    ],
)
def test_an_empty_loader_is_an_error(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SETTINGS["default"].score(calibration(**changes))


def test_no_fresh_probe_batch_left_is_an_error():
    criterion = AlterEva(**SMALL | {"num_probe_batches": 1}, second_probe="fresh")
    message = "the probe loader gives no batch after the first 1: at least one is needed to score weights"
    with pytest.raises(ValueError, match=re.escape(message)):
        criterion.score(calibration(probe_batches=random_batches(1)))


def test_a_short_loader_is_used_with_a_warning():
    criterion = AlterEva(**SMALL | {"num_reactivation_steps": 9})
    with pytest.warns(
        UserWarning, match="^9 training batches were asked for, the loader has 4: scoring with"
    ):
        nine = criterion.score(calibration())
    four = AlterEva(**SMALL).score(calibration())
    assert all(torch.equal(nine[name], four[name]) for name in four)
    with pytest.warns(
        UserWarning, match="^3 probe batches were asked for, the loader has 2: scoring with those"
    ):
        AlterEva(**SMALL).score(calibration(probe_batches=random_batches(2)))


def test_an_iterable_without_length_will_do():
    class Endless:
        def __iter__(self):
            return itertools.cycle(random_batches(3, seed=1))

    scores = SETTINGS["default"].score(calibration(probe_batches=Endless()))
    expected = SETTINGS["default"].score(calibration())
    assert all(torch.equal(scores[name], expected[name]) for name in scores)


def test_progress_is_told():
    told = []
    made = calibration(progress=lambda *what: told.append(what))
    SETTINGS["default"].score(made)
    assert told[-4:] == [("contribution", done, 3) for done in range(4)]
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == [
        "camera deactivated",
        "camera deactivated, reactivation",
        "camera deactivated, reactivated",
        "lidar deactivated",
        "lidar deactivated, reactivation",
        "lidar deactivated, reactivated",
        "contribution",
    ]


def test_a_calibration_takes_modalities_or_a_mapping():
    assert calibration().groups == calibration(modalities=BRANCHES).groups
    made = Calibration(two_tower(), squared_error, [], [], {"camera": "camera", "lidar": "lidar"})
    assert made.groups == calibration().groups


def broken(index, batches):
    image, *rest = batches[index]
    return [*batches[:index], (image * float("inf"), *rest), *batches[index + 1 :]]


@pytest.mark.filterwarnings("ignore:.*batches were asked for")
@pytest.mark.parametrize(
    "name", ["default", "difference", "abs_of_mean", "SNIP", "Taylor", "GraSP", "ProsPr"]
)
def test_batches_that_are_not_finite_are_left_out(name):
    criterion = dict(MADE)[name]
    probes = random_batches(3, seed=1)
    made = calibration(probe_batches=broken(1, probes), on_nonfinite="skip")
    expected = criterion.score(calibration(probe_batches=[probes[0], probes[2]]))
    for weight, scores in criterion.score(made).items():
        torch.testing.assert_close(scores, expected[weight])
    assert made.num_skipped > 0


@pytest.mark.filterwarnings("ignore:.*batches were asked for")
def test_if_no_batch_is_left_that_is_an_error():
    probes = [broken(0, [batch])[0] for batch in random_batches(2)]
    made = calibration(probe_batches=probes, on_nonfinite="skip")
    before = snapshot(made.model)
    with pytest.raises(ValueError, match="no probe batch is left: the loss or the gradient of each was not"):
        SETTINGS["default"].score(made)
    assert snapshot(made.model) == before


def test_what_to_do_with_batches_that_are_not_finite_is_checked():
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of \['raise', 'skip'\], got 'ignore'"):
        calibration(on_nonfinite="ignore")
