"""Every entry of oracles.json: exact values of all criteria on nets that fit in the head.

Those of AlterMOMA's own are in test_altereva.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from altermoma_pl import SNIP, GraSP, Magnitude, Masks, ProsPr, SynFlow, Taylor, Wanda, top_k
from altermoma_pl.score.passes import batch_gradients, mean_gradients
from tests.helpers.models import ORACLES, calibration, covers, linear, squared_error

NET = ORACLES["_net_A"]
X, T = (torch.tensor(NET[key], dtype=torch.float64) for key in ("X", "T"))
BOTH = [(X, T)]
SINGLE = [(X[:1], T[:1]), (X[1:], T[1:])]


class Chain(nn.Module):
    """y = W2 between(W1 x) / T, network A; that its layers are called modalities does not matter."""

    def __init__(self, first=NET["W1"], second=NET["W2"], temperature=1.0, between=None):
        super().__init__()
        self.W1, self.W2 = linear(first, dtype=torch.float64), linear(second, dtype=torch.float64)
        self.between = nn.Identity() if between is None else between
        self.temperature = temperature

    def forward(self, x):
        return self.W2(self.between(self.W1(x))) / self.temperature


def made(batches=BOTH, model=None, **changes):
    return calibration(
        Chain() if model is None else model,
        **{"probe_batches": batches, "training_batches": batches} | changes,
        modalities={"first": "W1", "second": "W2"},
    )


def by_layer(tensors):
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def close(found, expected):
    """The tensor, or those of both layers, equal what the oracle says."""
    if isinstance(found, dict):
        for name, tensor in by_layer(found).items():
            close(tensor, expected[name])
        return
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-14)


def ones(masks):
    return {name: mask.int().tolist() for name, mask in by_layer(masks).items()}


def signed_products(batch):
    """theta * g with its sign, from which channel scores are summed."""
    net = made()
    _, gradients = batch_gradients(net, "the batch", batch, net.weights)
    return by_layer({name: net.weights[name].detach() * g for name, g in gradients.items()})


@covers("_net_A", "gradient")
def test_the_net():
    loss, gradients = mean_gradients(made(), made().weights, 1, "gradients")
    assert loss == NET["loss"]
    net = made()
    close(batch_gradients(net, "both", BOTH[0], net.weights)[1], ORACLES["gradient"])
    assert list(gradients) == ["W1.weight", "W2.weight"]


@covers("magnitude")
def test_magnitude():
    close(Magnitude().score(made()), ORACLES["magnitude"])


@covers("snip")
def test_snip():
    scores, oracle = SNIP(1).score(made()), ORACLES["snip"]
    close(scores, oracle["raw"])
    total = sum(score.sum() for score in scores.values())
    assert total == oracle["total"]
    close({name: score / total for name, score in scores.items()}, oracle["normalised"])
    assert ones(top_k(scores, 0.5)) == oracle["mask_keep_4_of_8"]


@covers("snip_multi_batch")
def test_snip_takes_the_absolute_value_after_the_sum():
    oracle, net = ORACLES["snip_multi_batch"], made(SINGLE)
    scores = SNIP(2).score(net)
    close({name: 2 * score for name, score in scores.items()}, oracle["abs_of_sum"])
    _, absolute = mean_gradients(net, net.weights, 2, "gradients", absolute=True)
    close({name: net.weights[name].abs() * g for name, g in absolute.items()}, oracle["mean_of_abs"])


@pytest.mark.parametrize("temperature", [1, 2])
@covers("grasp_T1", "grasp_T2")
def test_grasp(temperature):
    oracle = ORACLES[f"grasp_T{temperature}"]
    net = made(model=Chain(temperature=temperature))
    scores = GraSP(1).score(net)
    close(scores, oracle["keep_score_theta_Hg"])
    close({name: -score for name, score in scores.items()}, oracle["paper_score_minus_theta_Hg"])
    close({name: score / net.weights[name] for name, score in scores.items()}, oracle["Hg"])
    assert abs(float(sum(score.sum() for score in scores.values()))) == oracle["norm_abs_sum"]
    assert ones(top_k(scores, 0.5)) == oracle["mask_keep_4_of_8"]
    assert not top_k(scores, 1 / 8)["W1.weight"][0, 0]  # the negative one goes first


SYNFLOW = SynFlow(num_iterations=2, normalize_heads=False)


@covers("synflow")
def test_synflow():
    oracle = ORACLES["synflow"]
    total, flow = SYNFLOW.flow(made([(X[:1], T[:1])]))
    close(flow, oracle)
    assert total == oracle["R"]
    assert [float(each.sum()) for each in flow.values()] == oracle["layer_sums"]


@pytest.mark.parametrize("density", [0.5, 0.375])
@covers("synflow_oneshot_density_0.5", "synflow_oneshot_density_0.375")
def test_synflow_in_one_shot(density):
    flow = SYNFLOW.flow(made([(X[:1], T[:1])]))[1]
    assert ones(top_k(flow, 1 - density)) == ORACLES[f"synflow_oneshot_density_{density}"]


@pytest.mark.parametrize("density", [0.5, 0.375])
@covers("synflow_iterative_2_steps_density_0.5", "synflow_iterative_2_steps_density_0.375")
def test_synflow_in_two_rounds(density):
    net, masks = made([(X[:1], T[:1])]), None
    scores = SynFlow(num_iterations=2, density=density).score(net)
    for step in ORACLES[f"synflow_iterative_2_steps_density_{density}"][:2]:
        total, flow = SYNFLOW.flow(net, masks)
        close(flow, step["scores"])
        assert total == step["R"]
        masks = top_k(flow, 1 - step["target_density"], within=masks)
        assert ones(masks) == step["mask"]
        assert masks.num_kept == step["kept"]
        assert top_k(scores, 1 - step["target_density"]) == masks  # one score holds both rounds


@covers("synflow_bn_eval")
def test_synflow_with_batch_norm():
    oracle = ORACLES["synflow_bn_eval"]
    norm = nn.BatchNorm1d(2, eps=oracle["eps"]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(oracle["gamma"]))
        norm.bias.fill_(-3.0)
        norm.running_var.copy_(torch.tensor(oracle["running_var"]))
        norm.running_mean.fill_(5.0)
    total, flow = SYNFLOW.flow(made([(X[:1], T[:1])], Chain(between=norm)))
    close(flow, oracle)
    assert total == pytest.approx(oracle["R"], rel=1e-12)


def filters(scores):
    return {name: score.sum(1) for name, score in scores.items()}


@covers("taylor_weight_sq_per_filter", "taylor_weight_sq_per_filter_avg_2_minibatches")
def test_taylor():
    close(filters(Taylor(1).score(made())), ORACLES["taylor_weight_sq_per_filter"])
    averaged = ORACLES["taylor_weight_sq_per_filter_avg_2_minibatches"]
    close(filters(Taylor(2).score(made(SINGLE))), averaged)


@covers("taylor_gate_sq_hidden", "taylor_2017_hidden")
def test_taylor_of_hidden_units():
    # The derivative with respect to a gate on a unit is the sum of theta * g over its weights.
    close(signed_products(BOTH[0])["W1"].sum(1).square(), ORACLES["taylor_gate_sq_hidden"])
    oracle = ORACLES["taylor_2017_hidden"]
    raw = torch.stack([signed_products(batch)["W1"].sum(1).abs() for batch in SINGLE]).mean(0)
    close(raw, oracle["raw"])
    close(raw / raw.norm(), oracle["layer_l2_normalised"])


@covers("wanda")
def test_wanda():
    oracle, net = ORACLES["wanda"], made()
    scores = Wanda(1).score(net)
    close(scores, {"W1": oracle["W1"], "W2": oracle["W2_dense_input"]})
    norms = {name: (score / net.weights[name].abs())[0] for name, score in scores.items()}
    close(norms, {"W1": oracle["x_colnorm"], "W2": oracle["h_colnorm_dense"]})
    masks = top_k(scores, 0.5, scope="row")
    assert ones(masks)["W1"] == oracle["per_row_mask_50pct"]["W1"]
    Masks({"W1.weight": masks["W1.weight"]}).apply_(net.model)
    close(Wanda(1).score(net)["W2.weight"], oracle["W2_after_pruning_W1"])


@pytest.mark.parametrize(
    "case", ORACLES["prospr"]["cases"], ids=lambda case: "-".join(map(str, list(case.values())[:5]))
)
@covers("prospr")
def test_prospr(case):
    steps, same = case["steps"], case["data"] == "same_batch"
    training = list(itertools.islice(itertools.cycle(SINGLE), steps))
    net = made(BOTH if same else [SINGLE[steps % 2]], training_batches=BOTH if same else training)
    seen = []

    def loss_fn(model, batch):
        loss = squared_error(model, batch)
        seen.append(loss.item())
        return loss

    net.loss_fn = loss_fn
    criterion = ProsPr(
        order=case["mode"],
        num_steps=steps,
        learning_rate=ORACLES["prospr"]["inner_lr"],
        momentum=case["momentum"],
        new_batches=not same,
        detach_first_buffer=case["first_buffer_detached"],
        num_probe_batches=1,
    )
    close(criterion.score(net), case)
    assert seen[steps] == pytest.approx(case["meta_loss"], rel=1e-12)


@covers("torch_pruning_hidden_group")
def test_a_hidden_channel_of_two_layers():
    oracle, products, magnitudes = (
        ORACLES["torch_pruning_hidden_group"],
        signed_products(BOTH[0]),
        by_layer(Magnitude().score(made())),
    )
    snip = by_layer(SNIP(1).score(made()))
    members = {
        "group_magnitude_p2": (magnitudes["W1"].square().sum(1), magnitudes["W2"].square().sum(0)),
        "group_taylor": (snip["W1"].sum(1), snip["W2"].sum(0)),
        "group_taylor_multivariable": (products["W1"].sum(1).abs(), products["W2"].sum(0).abs()),
    }
    assert members.keys() == oracle.keys() - {"note"}
    for name, (rows, columns) in members.items():
        mean = (rows + columns) / 2
        close(mean, oracle[name]["mean_reduced"])
        close(mean / mean.mean(), oracle[name]["mean_normalised"])


@covers("imp_20pct_rounds")
def test_magnitude_in_rounds():
    oracle = ORACLES["imp_20pct_rounds"]
    model = Chain(oracle["trained_W1"], oracle["trained_W2"])
    masks, left = None, 8
    for step in oracle["rounds"]:
        left -= math.ceil(0.2 * left)
        masks = top_k(Magnitude().score(made(model=model, masks=masks)), 1 - left / 8, within=masks)
        masks.apply_(model)
        assert ones(masks) == step["mask"]
        assert masks.num_kept == step["remaining"] == left


def test_every_entry_is_covered():
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    marks = [mark for source in sources for mark in re.findall(r"^@covers\((.+)\)$", source, re.MULTILINE)]
    covered = [key for mark in marks for key in re.findall(r'"([^"]+)"', mark)]
    assert sorted(covered) == sorted(ORACLES)
