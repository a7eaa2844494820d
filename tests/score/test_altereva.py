import dataclasses
import re

import pytest
import torch
from torch import nn

from altermoma_pl import AlterEva, Components, Masks, top_k
from tests.helpers.masks import shrank
from tests.helpers.models import (
    BRANCHES,
    ORACLES,
    OracleNet,
    Scalar,
    ThreeModalities,
    calibration,
    covers,
    oracle_batches,
    scalar_batch,
    squared_error,
    two_tower,
)

ORACLE = ORACLES["alter_moma"]
D = oracle_batches()
# Every weight by itself, and DeCI leads: what the equations of the paper are about.
PLAIN = AlterEva(alpha=1.0, beta=1.0, magnitude_share=0.0, redundancy_level="weight")
SUBTRACT = dataclasses.replace(PLAIN, combination="subtract")
LITERAL = dataclasses.replace(
    SUBTRACT,
    estimator="difference",
    reduction="abs_of_mean",
    normalization="sum",
    num_probe_batches=1,
    learning_rate=0.01,
    optimizer="sgd",
)
VARIANTS = {
    "literal_D_first_DB_last": (
        dataclasses.replace(LITERAL, second_probe="fresh", num_reactivation_steps=2),
        [D[0], D[2]],
        D[:2],
    ),
    "train_all_3_DB_is_last_trained": (
        dataclasses.replace(LITERAL, second_probe="fresh", num_reactivation_steps=3),
        [D[0], D[2]],
        D,
    ),
    "recommended_same_probe_mean_all": (
        dataclasses.replace(LITERAL, num_probe_batches=3, num_reactivation_steps=3),
        D,
        D,
    ),
}
SMALL = AlterEva(num_probe_batches=3, num_reactivation_steps=4, learning_rate=0.05)


def oracle_calibration(probe=D, training=D, **changes):
    changes = {"model": OracleNet()} | changes
    return calibration(probe_batches=probe, training_batches=training, **changes)


def close(found, expected, rtol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@covers("alter_moma")
def test_the_oracle(variant):
    criterion, probe, training = VARIANTS[variant]
    oracle = ORACLE["variants"][variant]
    components = criterion.components(oracle_calibration(probe, training))
    scores = criterion.combine(components)
    for group in ("camera", "lidar", "fusion"):
        close(components.deci[f"{group}.weight"], oracle["deci"][group])
        close(scores[f"{group}.weight"], oracle["S"][group])
        assert float(scores[f"{group}.weight"].sum()) == pytest.approx(
            oracle["S_sum_per_group"][group], abs=1e-14
        )
    close(components.reri["lidar"]["camera.weight"], oracle["reri_camera"])
    close(components.reri["camera"]["lidar.weight"], oracle["reri_lidar"])
    close(components.reri["lidar"]["fusion.weight"], oracle["reri_fusion_lidar_masked"])
    close(components.reri["camera"]["fusion.weight"], oracle["reri_fusion_camera_masked"])
    assert "lidar.weight" not in components.reri["lidar"]
    for keep in (5, 3):
        masks = top_k(scores, 1 - keep / 9)
        found = {name.split(".")[0]: mask.int().tolist() for name, mask in masks.items()}
        assert found == oracle["masks"][f"keep_{keep}_of_9"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_weights_after_reactivation(variant, modality):
    criterion, probe, training = VARIANTS[variant]
    made = oracle_calibration(probe, training)
    nn.init.zeros_(made.model.get_parameter(f"{modality}.weight"))
    dataclasses.replace(criterion, optimizer="sgd", learning_rate=0.01)._reactivate_(made, modality)
    oracle = ORACLE["variants"][variant][f"theta_B_{modality}_masked"]
    for group in {"camera", "lidar", "fusion"} - {modality}:
        close(made.model.get_parameter(f"{group}.weight"), oracle[group])
    assert not made.model.get_parameter(f"{modality}.weight").any()


def test_the_second_step_of_iterative_pruning():
    oracle = ORACLE["iterative_second_step_deci_of_masked_net"]
    masks = Masks({f"{g}.weight": torch.tensor(m, dtype=torch.bool) for g, m in oracle["mask1"].items()})
    made = oracle_calibration(masks=masks)
    masks.apply_(made.model)
    criterion = VARIANTS["recommended_same_probe_mean_all"][0]
    components = criterion.components(made)
    scores = criterion.combine(components, masks)
    for group, expected in oracle["deci"].items():
        close(components.deci[f"{group}.weight"], expected)
        mask = masks[f"{group}.weight"]
        assert torch.equal(torch.isneginf(scores[f"{group}.weight"]), ~mask)
    assert shrank(top_k(scores, 7 / 9, within=masks), masks)


SIZES = {"camera": 280_000, "lidar": 80_000, "fusion": 50_000}  # 28M, 8M, 5M parameters, scaled
BY_SUM = dataclasses.replace(SUBTRACT, normalization="sum")


def exponential(p):
    """Quantiles of the exponential distribution."""
    return -torch.log1p(-p)


QUANTILES = {
    "deci_exponential": exponential,
    "deci_lognormal_sigma1": lambda p: torch.special.ndtri(p).exp(),
    "deci_lognormal_sigma2": lambda p: (2 * torch.special.ndtri(p)).exp(),
}
TABLE = ORACLES["group_size_effect"]["table"]


def grid(size):
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def check_shares(scores, row, sparsity):
    """Of weights pruned in each group, and of the lowest score that stays."""
    masks = top_k(scores, float(sparsity))
    lowest = min(float(scores[name][mask].min()) for name, mask in masks.items())
    # The grid of quantiles cuts the tail of the sums: that is the tolerance.
    assert lowest / 100 == pytest.approx(row["tau"], rel=5e-3)  # a hundredth of the weights
    for name, mask in masks.items():
        assert 1 - float(mask.double().mean()) == pytest.approx(row[name], abs=1e-3)


@pytest.mark.parametrize("shape", QUANTILES)
@covers("group_size_effect")
def test_sums_favour_small_groups_and_means_do_not(shape):
    deci = {name: QUANTILES[shape](grid(size)) for name, size in SIZES.items()}
    components = Components(deci, {"camera": deci, "lidar": deci}, {name: name for name in deci}, {}, deci)
    by_sum = dataclasses.replace(BY_SUM, beta=0.0).combine(components)
    by_mean = dataclasses.replace(BY_SUM, beta=0.0, normalization="mean").combine(components)
    for sparsity, row in TABLE[shape].items():
        check_shares(by_sum, row, sparsity)
        for mask in top_k(by_mean, float(sparsity)).values():
            assert 1 - float(mask.double().mean()) == pytest.approx(float(sparsity), abs=1e-3)


def test_sums_favour_small_groups_of_differences_too():
    golden = (5**0.5 - 1) / 2  # pairs (i, frac(golden i)) fill the square evenly: independent draws
    index = {name: torch.arange(size, dtype=torch.float64) + 0.5 for name, size in SIZES.items()}
    deci = {name: exponential(grid(size)) for name, size in SIZES.items()}
    other = {name: exponential((i * golden).frac()) for name, i in index.items()}
    reri = {m: {n: r for n, r in other.items() if n != m} for m in ("camera", "lidar")}
    scores = BY_SUM.combine(Components(deci, reri, {name: name for name in deci}, {}, deci))
    assert {shape for shape in TABLE if shape not in QUANTILES} == {"alpha=beta_laplace(DeCI,ReRI iid exp)"}
    for sparsity, row in TABLE["alpha=beta_laplace(DeCI,ReRI iid exp)"].items():
        check_shares(scores, row, sparsity)


# With c = 2, l = 3, f = (1, -1) and the batches (x, z, t) below, the residual e = y - t is
#   all active: y = 2x - 3z;  without LiDAR: y = 2x;  without camera: y = -3z.
# Gradients: c: e f1 x, l: e f2 z, f1: e c x, f2: e l z.
BATCHES = [scalar_batch(1, 1, 1), scalar_batch(2, 1, 1)]  # e = -2, 0; without LiDAR 1, 3
SCALAR = AlterEva(
    num_probe_batches=2,
    num_reactivation_steps=1,
    learning_rate=0.1,
    optimizer="sgd",
    combination="subtract",
)


def scalar_components(**changes):
    changes = dict(changes)
    training = changes.pop("training", [scalar_batch(1, 1, 1)])
    made = calibration(Scalar(), probe_batches=BATCHES, training_batches=training)
    return dataclasses.replace(SCALAR, **changes).components(made)


@pytest.mark.parametrize(
    ("reduction", "camera"),
    [("mean_of_abs", (4 + 0) / 2), ("abs_of_mean", abs(-4 + 0) / 2)],
)
def test_deci_by_hand(reduction, camera):
    components = scalar_components(reduction=reduction)
    assert components.deci["camera.weight"].item() == camera
    assert components.losses["all"] == (2 + 0) / 2
    assert components.losses["without_lidar"] == (0.5 + 4.5) / 2


def test_the_reductions_differ_where_signs_do():
    made = calibration(
        Scalar(), probe_batches=[scalar_batch(1, 0, 1), scalar_batch(1, 0, 4)], loss_fn=squared_error
    )
    made.training_batches = BATCHES
    for reduction, expected in (("mean_of_abs", (2 + 4) / 2), ("abs_of_mean", abs(2 - 4) / 2)):
        criterion = dataclasses.replace(SCALAR, reduction=reduction, num_reactivation_steps=0)
        assert criterion.components(made).deci["camera.weight"].item() == expected


# One SGD step without LiDAR on (1, 1, 1): e = 1, so c = 2 - 0.1 * 1 = 1.9, f1 = 1 - 0.1 * 2 = 0.8.
# Then y = 1.52 x: residuals 0.52 and 2.04. Gradients of c: before e x = 1, 6; after 0.8 e x = 0.416, 3.264.
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("difference", 2 * abs((1 + 6) / 2 - (0.416 + 3.264) / 2)),
        ("reactivated", 2 * (0.416 + 3.264) / 2),
    ],
)
def test_estimators_by_hand(estimator, expected):
    components = scalar_components(estimator=estimator)
    assert components.reri["lidar"]["camera.weight"].item() == pytest.approx(expected, rel=1e-12)
    assert components.losses["without_lidar_reactivated"] == pytest.approx((0.52**2 + 2.04**2) / 4, rel=1e-12)


def components_of(deci, reri, group_of=None, magnitude=None):
    """Where the magnitude is not given it equals DeCI, and so does any geometric mean of the two."""
    deci = {name: torch.tensor(v) for name, v in deci.items()}
    reri = {m: {name: torch.tensor(v) for name, v in own.items()} for m, own in reri.items()}
    magnitude = {name: torch.tensor(v) for name, v in magnitude.items()} if magnitude else deci
    return Components(deci, reri, group_of or {name: name for name in deci}, {}, magnitude)


TWO = components_of(
    {"camera": [1.0, 3.0, 0.0], "lidar": [2.0], "shared": [1.0, 1.0]},
    {
        "camera": {"lidar": [5.0], "shared": [1.0, 3.0]},
        "lidar": {"camera": [4.0, 0.0, 0.0], "shared": [0.0, 2.0]},
    },
)


def test_discount_by_hand():
    # Camera: mean D 4/3, d = (.75, 2.25, 0); mean R 4/3, r = (3, 0, 0); D * min(1, d / r).
    scores = PLAIN.combine(TWO)
    close(scores["camera"], [1 * 0.75 / 3, 3.0, 0.0], rtol=1e-6)
    # Shared: d = (1, 1); r = mean of (.5, 1.5) and (0, 2) = (.25, 1.75).
    close(scores["shared"], [1.0, 1 / 1.75], rtol=1e-6)
    tolerant = dataclasses.replace(PLAIN, alpha=1.5, beta=2.0).combine(TWO)
    close(tolerant["shared"], [1.0, (1.5 / 1.75) ** 2], rtol=1e-6)
    protecting = dataclasses.replace(PLAIN, beta=-1.0).combine(TWO)
    close(protecting["shared"], [1.0, 1.75], rtol=1e-6)


def test_redundancy_of_whole_tensors_by_hand():
    # Camera: mean D 2, d = .5 and 1.5; mean R 4, r = 1.5 and .5 in the mean over each tensor.
    groups = {"a": "camera", "b": "camera", "lidar": "lidar"}
    deci = {"a": [1.0, 1.0], "b": [2.0, 4.0], "lidar": [1.0]}
    reri = {"lidar": {"a": [4.0, 8.0], "b": [0.0, 4.0]}, "camera": {"lidar": [1.0]}}
    components = components_of(deci, reri, groups)
    tensors = AlterEva(alpha=1.5, beta=3.0)
    close(tensors.combine(components)["a"], [(1.5 * 0.5 / 1.5) ** 3] * 2, rtol=1e-6)
    close(tensors.combine(components)["b"], [2.0, 4.0], rtol=1e-6)
    # With the first weight of "a" pruned: mean D 7/3 and R 12/3 of three; d = 3/7, r = 1 of the other two.
    masks = Masks({name: torch.ones_like(d, dtype=torch.bool) for name, d in components.deci.items()})
    masks["a"][0] = False
    pruned = components_of(
        deci | {"a": [0.0, 1.0]}, {**reri, "lidar": {"a": [0.0, 8.0], "b": [0.0, 4.0]}}, groups
    )
    expected = (1.5 * (1 / (7 / 3)) / (8 / 4)) ** 3
    close(tensors.combine(pruned, masks)["a"], [-torch.inf, expected], rtol=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 4.0), (0.5, 6.0), (1.0, 9.0)])
def test_what_leads_by_hand(share, expected):
    nothing = {"lidar": {"camera": [1.0]}, "camera": {"lidar": [1.0]}}
    deci, magnitude = {"camera": [4.0], "lidar": [4.0]}, {"camera": [9.0], "lidar": [9.0]}
    scores = AlterEva(magnitude_share=share).combine(components_of(deci, nothing, magnitude=magnitude))
    close(scores["camera"], [expected], rtol=1e-6)


def test_magnitudes_are_measured():
    made = calibration()
    magnitude = SMALL.components(made).magnitude
    assert all(torch.equal(magnitude[name], w.detach().abs()) for name, w in made.weights.items())


def test_subtraction_by_hand():
    scores = dataclasses.replace(SUBTRACT, alpha=2.0, beta=0.5, normalization="sum").combine(TWO)
    close(scores["camera"], [2 / 4 - 0.5, 2 * 3 / 4, 0.0], rtol=1e-6)
    close(scores["shared"], [1 - 0.25 * (1 / 4 + 0), 1 - 0.25 * (3 / 4 + 1)], rtol=1e-6)
    negative = dataclasses.replace(SUBTRACT, beta=-1.0, normalization="none").combine(TWO)
    close(negative["lidar"], [7.0])


def test_sums_and_means_run_over_live_weights_and_pruned_ones_score_minus_infinity():
    masks = Masks({n: torch.ones_like(d, dtype=torch.bool) for n, d in TWO.deci.items()})
    masks["camera"][2] = False
    criterion = dataclasses.replace(SUBTRACT, beta=0.0, normalization="mean")
    scores = criterion.combine(TWO, masks)
    assert scores["camera"].tolist() == [0.5, 1.5, -torch.inf]


def test_beta_zero_is_the_order_of_deci():
    made = calibration()
    for combination in ("subtract", "discount"):
        criterion = dataclasses.replace(
            SMALL, beta=0.0, alpha=2.0, magnitude_share=0.0, combination=combination
        )
        components = criterion.components(made)
        factor = 2.0 if combination == "subtract" else 1.0
        for name, score in criterion.combine(components).items():
            torch.testing.assert_close(score, factor * components.deci[name])


def test_combining_anew_equals_scoring_anew():
    stored = SMALL.components(calibration())
    for changes in (
        {"alpha": 0.5, "beta": 2.0},
        {"combination": "subtract", "normalization": "sum", "beta": -1.0},
    ):
        other = dataclasses.replace(SMALL, **changes)
        fresh = other.score(calibration())
        combined = other.combine(stored)
        assert all(torch.equal(combined[name], fresh[name]) for name in fresh)


def test_components_survive_a_file(tmp_path):
    components = SMALL.components(calibration())
    torch.save(components.state_dict(), tmp_path / "components.pt")
    loaded = Components.from_state_dict(torch.load(tmp_path / "components.pt", weights_only=True))
    first, second = SMALL.combine(components), SMALL.combine(loaded)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (loaded.group_of, loaded.losses) == (components.group_of, components.losses)
    assert {field.name for field in dataclasses.fields(Components)} == components.state_dict().keys()


@pytest.mark.parametrize("level", ["weight", "tensor"])
def test_states_say_the_level_of_redundancy_and_older_ones_tell_it_by_shape(level):
    state = dataclasses.replace(SMALL, redundancy_level=level).components(calibration()).state_dict()
    assert Components.from_state_dict(state).level == state.pop("level") == level
    assert Components.from_state_dict(state).level == level


def test_three_modalities_share_beta():
    names = ("camera", "lidar", "radar")
    reri = {m: {n: [1.0, 0.0] for n in (*names, "shared") if n != m} for m in names}
    reri["radar"]["shared"] = reri["radar"]["camera"] = [0.0, 1.0]
    components = components_of({n: [1.0, 1.0] for n in (*names, "shared")}, reri)
    criterion = dataclasses.replace(SUBTRACT, beta=6.0, normalization="sum")
    scores = criterion.combine(components)
    close(scores["camera"], [0.5 - 6 / 2, 0.5 - 6 / 2])  # beta / (M - 1) each
    close(scores["lidar"], [0.5 - 6, 0.5])
    close(scores["shared"], [0.5 - 2 * 6 / 3, 0.5 - 6 / 3])  # beta / M each
    model = ThreeModalities()
    batches = [tuple(torch.tensor([[v]]) for v in (1.0, 2.0, 3.0, 4.0))]
    made = calibration(
        model, probe_batches=batches, training_batches=batches, modalities={n: n for n in names}
    )
    measured = dataclasses.replace(SMALL, num_probe_batches=1, num_reactivation_steps=1).components(made)
    assert {m: set(r) for m, r in measured.reri.items()} == {
        m: {f"{n}.weight" for n in (*names, "head") if n != m} for m in names
    }


@pytest.mark.parametrize("normalization", ["none", "mean", "sum"])
def test_no_learning_means_no_redundancy_and_one_warning_for_each_group(normalization):
    criterion = dataclasses.replace(
        SMALL,
        estimator="difference",
        combination="subtract",
        normalization=normalization,
        learning_rate=0.0,
    )
    components = criterion.components(calibration())
    assert not any(r.any() for own in components.reri.values() for r in own.values())
    with pytest.warns(UserWarning, match="ReRI of the group") as caught:
        scores = criterion.combine(components)
    assert sorted(str(w.message).split(":")[0] for w in caught) == [
        "ReRI of the group 'camera' with 'lidar' deactivated is 0",
        "ReRI of the group 'lidar' with 'camera' deactivated is 0",
        "ReRI of the group 'shared' with 'camera' deactivated is 0",
        "ReRI of the group 'shared' with 'lidar' deactivated is 0",
    ]
    without = dataclasses.replace(criterion, beta=0.0, learning_rate=0.1).score(calibration())
    assert all(torch.equal(scores[name], without[name]) for name in scores)


def test_the_scale_of_the_loss_does_not_matter():
    criterion, probe, training = VARIANTS["recommended_same_probe_mean_all"]
    scores = criterion.score(oracle_calibration(probe, training))
    scaled = dataclasses.replace(criterion, learning_rate=criterion.learning_rate / 8).score(
        oracle_calibration(probe, training, loss_fn=lambda m, b: 8 * squared_error(m, b))
    )
    for name in scores:
        close(scaled[name], scores[name].detach())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_deactivated_and_pruned_weights_stay_zero_while_reactivating(optimizer):
    model = two_tower()
    masks = top_k({n: w.detach().abs() for n, w in calibration(model).weights.items()}, 0.4)
    masks.apply_(model)
    seen = []

    def watch(net, batch):
        off = [g for g in BRANCHES if not net.get_submodule(g)[0].weight.any()]
        pruned = {n: net.get_parameter(n)[~m].abs().sum().item() for n, m in masks.items()}
        moved = not torch.equal(net.head[1].weight, head)
        seen.append((off, sum(pruned.values()), moved))
        if off:
            weights = [p for n, p in net.named_parameters() if n.startswith(off[0] + ".0")]
            loss = squared_error(net, batch)
            if torch.is_grad_enabled():
                gradients = torch.autograd.grad(loss, weights, retain_graph=True)
                assert not any(g.any() for g in gradients)
            return loss
        return squared_error(net, batch)

    head = model.head[1].weight.detach().clone()
    criterion = dataclasses.replace(SMALL, optimizer=optimizer)
    criterion.score(calibration(model, masks=masks, loss_fn=watch))
    assert [off for off, _, _ in seen] == [["camera"]] * 10 + [["lidar"]] * 10 + [[]] * 3
    assert {pruned for _, pruned, _ in seen} == {0.0}
    assert [moved for _, _, moved in seen[:10]] == [False] * 4 + [True] * 6


@pytest.mark.parametrize(("noise", "moves"), [("suppressed", False), ("as_is", True)])
def test_running_statistics_and_flags(noise, moves):
    model = two_tower()
    model.camera[1].eval()
    seen = []

    def watch(net, batch):
        seen.append((float(net.lidar[1].running_mean[0]), net.lidar[1].training, net.head[0].training))
        return squared_error(net, batch)

    dataclasses.replace(SMALL, noise=noise).score(calibration(model, loss_fn=watch))
    assert (len({mean for mean, _, _ in seen}) > 1) is moves
    assert {flags for _, *flags in map(list, seen) for flags in [tuple(flags)]} == {(moves, moves)}
    assert model.lidar[1].running_mean.tolist() == pytest.approx([0.1] * 4)
    assert not model.camera[1].training
    assert model.lidar[1].training


def test_gradients_are_clipped():
    made = calibration(Scalar(), probe_batches=BATCHES, training_batches=[scalar_batch(1, 1, 1)])
    nn.init.zeros_(made.model.lidar.weight)
    criterion = AlterEva(num_reactivation_steps=1, optimizer="sgd", learning_rate=1.0, gradient_clip=0.5)
    criterion._reactivate_(made, "lidar")  # gradients 1 of c and 2 of f1: clipped by 0.5 / sqrt 5
    assert made.model.camera.weight.item() == pytest.approx(2 - 0.5 / 5**0.5, rel=1e-5)


def test_the_preset_is_literal():
    paper = AlterEva.paper()
    assert (paper.alpha, paper.beta, paper.num_probe_batches, paper.learning_rate) == (1.0, 1.0, 1, 1e-4)
    assert (paper.estimator, paper.combination, paper.normalization) == ("difference", "subtract", "sum")
    assert (paper.optimizer, paper.noise, paper.second_probe) == ("adam", "as_is", "fresh")
    assert (paper.gradient_clip, paper.magnitude_share, paper.redundancy_level) == (None, 0.0, "weight")


def test_a_group_that_the_loss_ignores_is_an_error():
    made = calibration(
        loss_fn=lambda model, batch: model.camera(batch[0]).sum() + 0 * squared_error(model, batch)
    )
    message = "DeCI of the group 'lidar' is 0: the loss depends on none of its weights"
    with pytest.raises(ValueError, match=re.escape(message)):
        SMALL.score(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"estimator": "x"},
            "estimator must be one of ['difference', 'reactivated'], got 'x'",
        ),
        ({"reduction": "x"}, "reduction must be one of ['mean_of_abs', 'abs_of_mean'], got 'x'"),
        ({"combination": "x"}, "combination must be one of ['subtract', 'discount'], got 'x'"),
        ({"normalization": "x"}, "normalization must be one of ['mean', 'sum', 'none'], got 'x'"),
        ({"optimizer": "x"}, "optimizer must be one of ['sgd', 'adam'], got 'x'"),
        ({"noise": "x"}, "noise must be one of ['suppressed', 'as_is'], got 'x'"),
        ({"second_probe": "x"}, "second_probe must be one of ['same', 'fresh'], got 'x'"),
        ({"num_probe_batches": 0}, "num_probe_batches must be at least 1, got 0"),
        ({"num_reactivation_steps": -1}, "num_reactivation_steps must be at least 0, got -1"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0, got -0.1"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"beta": float("-inf")}, "beta must be finite, got -inf"),
        ({"gradient_clip": 0}, "gradient_clip must be positive or None, got 0"),
        ({"alpha": 0.0}, "the combination 'discount' needs alpha > 0, got alpha=0.0"),
        ({"magnitude_share": 1.5}, "magnitude_share must be in [0, 1], got 1.5"),
        ({"redundancy_level": "x"}, "redundancy_level must be one of ['weight', 'tensor'], got 'x'"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AlterEva(**changes)


def test_moments_are_let_go_at_once(monkeypatch):
    made = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    SMALL.components(calibration())
    assert [len(optimizer.state) for optimizer in made] == [0, 0]


def test_redundancy_of_tensors_is_not_that_of_weights():
    components = SMALL.components(calibration())
    assert {r.shape for own in components.reri.values() for r in own.values()} == {()}
    with pytest.raises(
        ValueError, match="hold the redundancy of whole tensors, and redundancy_level='weight'"
    ):
        dataclasses.replace(SMALL, redundancy_level="weight").combine(components)


def test_measured_by_weight_and_taken_by_tensor_is_measured_by_tensor():
    by_weight = dataclasses.replace(SMALL, redundancy_level="weight").components(calibration())
    expected = SMALL.combine(SMALL.components(calibration()))
    for name, scores in SMALL.combine(by_weight).items():
        close(scores, expected[name].detach(), rtol=1e-6)
