import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from altermoma_pl import Masks, SynFlow, top_k
from altermoma_pl.score.linearized import Linearized
from tests.helpers.masks import shrank
from tests.helpers.models import calibration, linear, random_batches, scatter, two_tower

PLAIN = SynFlow(num_iterations=1, normalize_heads=False)


class Towers(nn.Module):
    """Two towers of one module each and a head on what they give, side by side."""

    def __init__(self, camera, lidar, head):
        super().__init__()
        self.camera, self.lidar, self.head = camera, lidar, head

    def forward(self, x, z):
        return self.head(torch.cat([self.camera(x), self.lidar(z)], 1))


def rows(values):
    return linear(values, dtype=torch.float64)


def mean_output(model, batch):
    return model(*batch).float().mean()


def made(model, batch=None, loss_fn=mean_output, **changes):
    batches = [batch or tuple(torch.randn(1, 2, dtype=torch.float64) for _ in range(2))]
    return calibration(model, loss_fn=loss_fn, probe_batches=batches, **changes)


def scalar_towers(between, **options):
    """y = w2 * between(w1 * 1) + w3 * 1 with w1 = -2, w2 = 3, w3 = -5."""
    camera = nn.Sequential(rows([[-2.0]]), between, rows([[3.0]]))
    model = Towers(camera, nn.Identity(), rows([[1.0, 0.0]]))
    model.lidar = rows([[-5.0]])
    batch = tuple(torch.full((1, 1), -7.0, dtype=torch.float64) for _ in range(2))
    return made(model, batch, **options)


def test_two_inputs_by_hand():
    # Ones go into both towers: |-2| * |1| + |-5| * |-3| = 17.
    model = Towers(rows([[-2.0]]), rows([[-5.0]]), rows([[1.0, -3.0]]))
    total, flow = PLAIN.flow(made(model, tuple(torch.full((1, 1), v).double() for v in (0.0, -9.0))))
    assert total == 17
    assert {name: f.tolist() for name, f in flow.items()} == {
        "camera.weight": [[2.0]],
        "lidar.weight": [[15.0]],
        "head.weight": [[2.0, 15.0]],
    }


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(),
        nn.ReLU6(),  # no ceiling: flow is larger than 6 in wide networks
        nn.Hardtanh(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.ELU(),
        nn.SELU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.Hardswish(),
        nn.Softplus(),
        nn.Tanh(),
        nn.Dropout(0.9),
        nn.Identity(),
        nn.LayerNorm(1),
        nn.BatchNorm1d(1, eps=0.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_activations_and_norms_at_rest_pass_flow(between):
    total, flow = PLAIN.flow(scalar_towers(between.double()))
    assert total == pytest.approx(6, rel=1e-12)
    assert flow["camera.0.weight"].item() == pytest.approx(6, rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "size"),
    [
        (nn.GroupNorm(1, 2), (1, 2, 4)),
        (nn.InstanceNorm1d(2, affine=True), (1, 2, 4)),
        (nn.LayerNorm(2), (1, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_scale_by_gamma_and_add_nothing(norm, size):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 3.0]))
        norm.bias.fill_(100.0)
    x = torch.ones(size, requires_grad=True)
    with Linearized():
        found = norm(x * 5)
    assert found.transpose(1, -1).reshape(-1, 2).unique(dim=0).tolist() == [[10.0, 15.0]]


def test_a_softmax_is_uniform_and_feeds_its_input():
    # Shares 1/2 each of the logits (2, 4), times 3 and 5: the value is 4; a gate gets what it lets pass.
    logits = torch.tensor([[2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    with Linearized():
        shares = logits.float().softmax(1)
        value = (shares * torch.tensor([3.0, 5.0])).sum()
        (gradient,) = torch.autograd.grad(value, logits)
    assert shares.tolist() == [[0.5, 0.5]]
    assert (logits * gradient).tolist() == [[1.5, 2.5]]
    with Linearized():
        assert (logits.sigmoid() + torch.sigmoid(logits)).tolist() == [[1.0, 1.0]]
        assert functional.softmax(logits - 3, 1).tolist() == [[0.0, 1.0]]  # what is negative is masked


def test_functions_of_data_alone_are_as_ever():
    x = torch.tensor([-1.0, 2.0])
    kernel = torch.tensor([[-1.0, 1.0]])
    with Linearized():
        found = [x.softmax(0), x.exp(), functional.relu6(-x), functional.linear(x, kernel), x.sigmoid()]
    expected = [x.softmax(0), x.exp(), functional.relu6(-x), functional.linear(x, kernel), x.sigmoid()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.double())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_averages_the_values_that_it_may_see(batched, masked):
    attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=True)
    scatter(attention)
    x = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 1
    x = (x if batched else x[0]).requires_grad_()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if masked else None
    with Linearized():
        found, weights = attention(x, x, x, attn_mask=mask)
    share = torch.ones(5, 5).tril() if masked else torch.ones(5, 5)
    share = (share / share.sum(1, keepdim=True)).double()
    value = x.double() @ attention.in_proj_weight[8:].abs().double().T
    expected = share @ value @ attention.out_proj.weight.abs().double().T
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, share.expand_as(weights))


def test_attention_passes_over_padding_and_masks_of_every_kind():
    q, k, v = (torch.rand(2, 2, 4, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    added = torch.zeros(4, 4).masked_fill(~allowed, -torch.inf)
    expected = (allowed.double() / allowed.sum(1, keepdim=True)) @ v
    with Linearized():
        attend = functional.scaled_dot_product_attention
        for options in ({"is_causal": True}, {"attn_mask": allowed}, {"attn_mask": added}):
            torch.testing.assert_close(attend(q, k, v, **options), expected)
    attention = scatter(nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True))
    padding = torch.tensor([[False, False, True], [False, True, True]])
    query, key = torch.rand(2, 5, 4).requires_grad_(), torch.rand(2, 3, 3).requires_grad_()
    with Linearized():
        _, weights = attention(query, key, key, key_padding_mask=padding, average_attn_weights=False)
        added = torch.zeros(4, 5, 3).masked_fill(padding.repeat_interleave(2, 0)[:, None], -torch.inf)
        again = attention(query, key, key, attn_mask=added, average_attn_weights=False)[1]
        assert attention(query, key, key, need_weights=False)[1] is None
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(weights, expected[:, None, None].expand_as(weights))
    torch.testing.assert_close(again, weights)


def test_a_transformer_block_has_flow_in_every_weight():
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
    model = Towers(nn.Sequential(nn.Linear(3, 4), block), nn.Linear(2, 4), nn.Linear(4, 2))
    scatter(model)
    batch = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    flow = SynFlow().flow(made(model, batch))[1]
    assert "camera.1.self_attn.in_proj_weight" in flow
    assert all(bool((f > 0).all()) for f in flow.values())


class Pyramid(nn.Module):
    """Convolutions, grouped and transposed, pooling, a residual added in place, three heads."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU())
        self.lidar = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.mix = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.heat, self.box, self.seg = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1), nn.Linear(4, 1)
        scatter(self)

    def forward(self, image, points):
        x = torch.cat([self.camera(image), self.lidar(points)], 1)
        y = self.mix(x)
        y += x
        z = self.up(functional.max_pool2d(y, 2))
        heat = self.heat(z)
        heat *= 0.5
        return heat.sigmoid(), self.box(z).exp(), self.seg(z.flatten(2).mean(2))


def detection_loss(model, batch):
    heat, box, seg = (output.float() for output in model(*batch))
    loss = functional.binary_cross_entropy(heat, torch.full_like(heat, 0.5))
    return loss + box.log().abs().mean() + functional.mse_loss(seg, torch.zeros_like(seg))


IMAGE = torch.randn(2, 2, 4, 4), torch.randn(2, 1, 4, 4)


def test_flow_is_conserved_and_each_head_counts_the_same():
    net = made(Pyramid(), IMAGE, detection_loss)
    total, flow = SynFlow().flow(net)
    assert total == pytest.approx(3, rel=1e-12)
    for head in ("heat", "box", "seg"):
        assert flow[f"{head}.weight"].sum().item() == pytest.approx(1, rel=1e-12)
    assert flow["up.weight"].sum().item() == pytest.approx(3, rel=1e-12)
    towers = sum(flow[f"{tower}.0.weight"].sum().item() for tower in ("camera", "lidar"))
    assert towers == pytest.approx(3, rel=1e-12)
    assert all(bool((f > 0).all()) for f in flow.values())


def test_flow_does_not_depend_on_data_biases_running_means_and_signs():
    first = SynFlow().flow(made(Pyramid(), IMAGE, detection_loss))
    other = Pyramid()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.fill_(9.0) if "bias" in name else parameter.neg_()
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(50.0)
    second = SynFlow().flow(made(other, tuple(torch.zeros_like(x) for x in IMAGE), detection_loss))
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_masked_weights_have_no_flow():
    net = made(Pyramid(), IMAGE, detection_loss)
    masks = top_k(SynFlow().flow(net)[1], 0.5)
    flow = SynFlow().flow(net, masks)[1]
    assert not any(flow[name][~mask].any() for name, mask in masks.items())
    masks.apply_(net.model)
    again = SynFlow().flow(net)[1]
    assert all(torch.equal(flow[name], again[name]) for name in flow)


def test_the_score_holds_the_masks_of_every_round():
    net = made(Pyramid(), IMAGE, detection_loss)
    criterion = SynFlow(num_iterations=6, density=0.1)
    scores, masks = criterion.score(net), None
    for done in range(6):
        target = 1 - 0.1 ** ((done + 1) / 6)
        masks = top_k(criterion.flow(net, masks)[1], target, within=masks)
        assert top_k(scores, target) == masks
    flow = criterion.flow(net, masks)[1]
    assert top_k(scores, 0.95) == top_k(flow, 0.95, within=masks)
    assert criterion.flow(net, masks)[0] > 0  # no layer has collapsed


def test_rounds_go_on_from_earlier_masks():
    net = made(Pyramid(), IMAGE, detection_loss)
    earlier = top_k(SynFlow().flow(net)[1], 0.6)
    later = made(Pyramid(), IMAGE, detection_loss, masks=earlier)
    scores = SynFlow(num_iterations=3, density=0.25).score(later)
    assert not any(scores[name][~mask].any() for name, mask in earlier.items())
    alive = torch.cat([scores[name][mask] for name, mask in earlier.items()])
    assert bool((alive >= 1).all())
    assert shrank(top_k(scores, 0.9, within=earlier), earlier)


def test_balanced_modalities_shrink_by_the_same_factor():
    model = Pyramid()
    with torch.no_grad():
        model.lidar[0].weight.mul_(1e-6)
    net = made(model, IMAGE, detection_loss)
    alone = top_k(SynFlow(num_iterations=4, density=0.1).score(net), 0.9)
    assert not alone["lidar.0.weight"].any()
    balanced = SynFlow(num_iterations=4, density=0.1, balance_modalities=True)
    masks = top_k(balanced.score(net), 0.9)
    for tower in ("camera", "lidar"):
        size = masks[f"{tower}.0.weight"].numel()
        assert int(masks[f"{tower}.0.weight"].sum()) == size - round(0.9 * size)
    # From masks of unlike density, each goes on from its own.
    later = made(model, IMAGE, detection_loss, masks=top_k(SynFlow(num_iterations=4).score(net), 0.3))
    assert not later.masks["lidar.0.weight"].all()
    assert shrank(top_k(balanced.score(later), 0.9, within=later.masks), later.masks)
    gone = made(model, IMAGE, detection_loss, masks=alone)
    assert not balanced.score(gone)["lidar.0.weight"].any()


def test_a_network_so_deep_that_single_precision_overflows():
    deep = nn.Sequential(nn.Linear(3, 64), *(nn.Linear(64, 64) for _ in range(40)), nn.Linear(64, 4))
    with torch.no_grad():
        for layer in deep:
            layer.weight.fill_(1.0)
    model = Towers(deep, nn.Linear(2, 4), nn.Linear(8, 1))
    total, flow = PLAIN.flow(made(model, random_batches(1)[0][:2]))
    assert total > torch.finfo(torch.float32).max
    assert all(bool(torch.isfinite(f).all()) for f in flow.values())


def test_constants_of_geometry_stay_and_other_parameters_lose_their_sign():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = rows([[-2.0]])
            self.offset = nn.Parameter(torch.tensor([-4.0]), requires_grad=False)
            self.gain = nn.Parameter(torch.tensor([-0.5]))
            self.bias = nn.Parameter(torch.tensor([-0.5]))

        def forward(self, x):
            return self.net(x) * self.gain * self.offset.abs() * (self.offset < 0) + self.bias

    model = Towers(Scaled(), rows([[1.0]]), rows([[1.0, 1.0]]))
    total, _ = PLAIN.flow(made(model, tuple(torch.zeros(1, 1).double() for _ in range(2))))
    assert total == 2 * 0.5 * 4 + 1


def test_tensors_changed_in_place_keep_their_type_and_content():
    buffer, outside = torch.zeros(3), torch.ones(1)
    with Linearized():
        grown = torch.zeros(3)
        grown[1] = torch.tensor(2.0)
        grown += torch.ones(3)
        buffer.add_(grown)
        buffer[0] = grown[1]
        grown.index_add_(0, torch.tensor([2]), outside)
    assert grown.dtype == torch.float64
    assert buffer.dtype == torch.float32
    assert buffer.tolist() == [3.0, 3.0, 1.0]


def test_casts_of_user_code_lose_nothing():
    flow = torch.tensor([1e300, 1.0 + 1e-12], dtype=torch.float64, requires_grad=True)
    with Linearized():
        casts = [flow.float(), flow.half(), flow.to(torch.bfloat16), flow.type_as(torch.ones(1))]
        assert all(torch.equal(each, flow) for each in casts)
        assert flow.to(torch.int64)[1].tolist() == 1
        assert torch.ones(1).float().dtype == torch.float64


def test_losses_that_refuse_what_is_no_probability_pass():
    flow = torch.tensor([5.0, 7.0], requires_grad=True)
    target = torch.tensor([0.0, 1.0])
    with Linearized():
        assert functional.binary_cross_entropy(flow, target) == 6
        assert functional.binary_cross_entropy(flow, target, reduction="none").shape == (2,)


def test_a_head_that_is_cut_off_leaves_the_others_alone():
    net = made(Pyramid(), IMAGE, detection_loss)
    masks = Masks.dense(net.weights)
    masks["heat.weight"][:] = False
    total, flow = SynFlow().flow(net, masks)
    assert total == pytest.approx(2)
    assert all(bool(torch.isfinite(f).all()) for f in flow.values())


def test_what_the_loss_draws_at_random_is_drawn_the_same_in_each_round():
    def loss_fn(model, batch):
        image, points = batch
        seen.append(torch.rand(4, 1, 1))
        return detection_loss(model, (image, points))

    seen = []
    for seed in (1, 2):  # that of the process does not matter
        torch.manual_seed(seed)
        SynFlow(num_iterations=2).score(made(Pyramid(), IMAGE, loss_fn))
    assert len(seen) == 6
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_no_layer_to_score_is_an_error():
    net = made(two_tower(), random_batches(1)[0][:2], torch.no_grad()(mean_output))
    message = "on probe batch 0 no linear layer or convolution runs that depends on a prunable weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        SynFlow().score(net)


def test_flow_that_is_not_finite_is_an_error():
    net = scalar_towers(nn.Identity())
    with torch.no_grad():
        net.model.camera[0].weight.fill_(1e200)
        net.model.camera[2].weight.fill_(1e200)
    with pytest.raises(ValueError, match=re.escape("the synaptic flow is not finite (R = inf)")):
        PLAIN.score(net)


def test_progress_is_told():
    told = []
    net = made(Pyramid(), IMAGE, detection_loss, progress=lambda *what: told.append(what))
    SynFlow(num_iterations=2).score(net)
    assert [what for what in told if what[2] == 2] == [("synaptic flow", done, 2) for done in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"density": 0.0}, "density must be in (0, 1), got 0.0"),
        ({"density": 1.0}, "density must be in (0, 1), got 1.0"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SynFlow(**options)


def test_everything_pruned_at_once_still_ranks():
    model = Towers(rows([[1.0]]), rows([[2.0]]), rows([[1.0, 1.0]]))
    net = made(model, tuple(torch.ones(1, 1).double() for _ in range(2)))
    scores = SynFlow(num_iterations=1, density=0.01).score(net)
    assert {name: s.flatten().tolist() for name, s in scores.items()} == {
        "camera.weight": [1.0],
        "lidar.weight": [2.0],
        "head.weight": [1.0, 2.0],
    }
    assert isinstance(top_k(scores, 0.5), Masks)
