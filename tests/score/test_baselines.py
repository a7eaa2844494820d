"""SNIP, Taylor, GraSP, ProsPr and Wanda beyond the contract and the oracles."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from altermoma_pl import SNIP, GraSP, Masks, ProsPr, Taylor, Wanda, top_k
from altermoma_pl.score.passes import batch_gradients
from tests.helpers.models import Scalar, calibration, random_batches, scalar_batch, squared_error, two_tower

BATCHES = [scalar_batch(1, 1, 1), scalar_batch(2, 1, 1)]


def scalar(**changes):
    """y = 2x - 3z; with BATCHES the residuals are -2 and 0."""
    return calibration(Scalar(), **{"probe_batches": BATCHES, "training_batches": BATCHES} | changes)


def values(scores):
    return {name: score.flatten().tolist() for name, score in scores.items()}


def test_snip_and_taylor_by_hand():
    # theta * g: c: 2 * -2 and 0; l: 3 * 2 and 0; f1: -4 and 0; f2: -1 * -6 and 0.
    assert values(SNIP(2).score(scalar())) == {
        "camera.weight": [2.0],
        "lidar.weight": [3.0],
        "fusion.weight": [2.0, 3.0],
    }
    assert values(Taylor(2).score(scalar())) == {
        "camera.weight": [8.0],
        "lidar.weight": [18.0],
        "fusion.weight": [8.0, 18.0],
    }


def test_norm_layers_are_quiet_so_products_do_not_cancel():
    # With the batch's own statistics the loss does not depend on the scale of a filter.
    net = calibration(two_tower())
    _, gradients = batch_gradients(net, "batch", net.probe_batches[0], net.weights)
    weight = net.weights["camera.0.weight"].detach()
    loud = (weight * gradients["camera.0.weight"]).sum(1).abs().sum()
    seen = SNIP(1).score(net)["camera.0.weight"].sum()
    assert float(loud) < 0.05 * float(seen)


class Dense(nn.Module):
    """A smooth net in float64 whose Hessian fits in memory."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.camera, self.lidar, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(4, 1)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, x, z):
        return self.head(torch.cat([self.camera(x), self.lidar(z)], -1).tanh())


def dense(**changes):
    batches = [tuple(t.double() for t in batch) for batch in random_batches(3, seed=5)]
    defaults = {"model": Dense(), "probe_batches": batches[:2], "training_batches": batches}
    return calibration(**defaults | changes)


def flat_loss(net, batches):
    """The mean loss as a function of the prunable weights in one vector, and these."""
    weights = net.weights
    start = torch.cat([w.detach().flatten() for w in weights.values()])

    def loss(vector):
        parts = vector.split([w.numel() for w in weights.values()])
        named = {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}
        outputs = [
            0.5 * (torch.func.functional_call(net.model, named, batch[:2]) - batch[2]).square().mean()
            for batch in batches
        ]
        return torch.stack(outputs).mean()

    return loss, start


def flatten(scores):
    return torch.cat([score.flatten() for score in scores.values()]).detach()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_grasp_equals_the_whole_hessian():
    net = dense()
    loss, start = flat_loss(net, net.probe_batches)
    gradient = torch.func.grad(loss)(start)
    expected = start * (torch.func.hessian(loss)(start) @ gradient)
    scores = flatten(GraSP(2).score(net))
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    differences = flatten(GraSP(2, hessian="finite_difference").score(net))
    assert 0 < relative_error(differences, expected) < 5e-3


@pytest.mark.parametrize("hessian", ["exact", "finite_difference"])
def test_grasp_of_a_masked_net_is_that_of_its_live_weights(hessian):
    net = dense()
    masks = top_k({name: w.detach().abs() for name, w in net.weights.items()}, 0.5)
    masks.apply_(net.model)
    seen = []

    def watch(model, batch):
        seen.append(sum(model.get_parameter(n)[~m].abs().sum().item() for n, m in masks.items()))
        return squared_error(model, batch)

    net = dense(model=net.model, masks=masks, loss_fn=watch)
    scores = flatten(GraSP(2, hessian=hessian).score(net))
    assert set(seen) == {0.0}
    loss, start = flat_loss(net, net.probe_batches)
    alive = torch.cat([mask.flatten() for mask in masks.values()])
    gradient = torch.func.grad(loss)(start) * alive
    expected = start * (torch.func.hessian(loss)(start) @ gradient)
    assert relative_error(scores, expected) < 5e-3


class Once(torch.autograd.Function):
    """An operation with a first derivative only, as of compiled kernels."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def once(model, batch):
    return Once.apply(model(*batch[:2])).square().mean()


def distance(model, batch):
    output = model(*batch[:2])
    return torch.cdist(output, output.detach() + 1).square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (once, "a function is marked with @once_differentiable"),
        (distance, "the derivative for '_cdist_backward'"),
    ],
)
@pytest.mark.parametrize(
    ("criterion", "option"),
    [
        (GraSP(2), {"hessian": "finite_difference"}),
        (ProsPr(order="full", num_steps=2, num_probe_batches=2), {"order": "first_order"}),
    ],
)
def test_an_operation_without_second_derivative_is_explained(criterion, option, loss_fn, reason):
    net = dense(loss_fn=loss_fn)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    message = f"an operation of the model cannot be differentiated twice ({reason}"
    ((name, value),) = option.items()
    with pytest.raises(RuntimeError, match=re.escape(message) + f".*: use {name}='{value}'"):
        criterion.score(net)
    assert all(torch.equal(before[name], p) for name, p in net.model.named_parameters())
    scores = dataclasses.replace(criterion, **option).score(net)
    assert all(bool(score.any()) for score in scores.values())


def test_other_errors_of_the_second_pass_are_not_dressed_up():
    class Broken(Once):
        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 2 * Fails.apply(x) * gradient

    class Fails(Once):
        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of something")

    net = dense(loss_fn=lambda model, batch: Broken.apply(model(*batch[:2])).square().mean())
    with pytest.raises(RuntimeError, match=r"^out of something$"):
        GraSP(2).score(net)


def test_attention_is_differentiated_twice():
    class Attending(Dense):
        def forward(self, x, z):
            tokens = torch.stack([self.camera(x), self.lidar(z)], -2)[:, None]  # 4 axes: the fast kernel
            return functional.scaled_dot_product_attention(tokens, tokens, tokens).sum((-2, -1))

    scores = GraSP(2).score(dense(model=Attending()))
    assert scores["camera.weight"].all()
    assert not scores["head.weight"].any()


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    net = dense(loss_fn=lambda model, batch: model.camera(batch[0]).mean() + 0 * squared_error(model, batch))
    assert not flatten(GraSP(2).score(net)).any()
    linear = dense(loss_fn=lambda model, batch: model.camera(batch[0]).mean() + model.lidar(batch[1]).mean())
    assert not flatten(GraSP(2).score(linear)).any()
    zero = dense(loss_fn=lambda model, batch: 0 * squared_error(model, batch))
    assert not flatten(GraSP(2, hessian="finite_difference").score(zero)).any()


def test_full_prospr_equals_differentiating_through_the_steps():
    net = dense()
    parameters = dict(net.model.named_parameters())
    gates = {name: torch.ones_like(w, requires_grad=True) for name, w in net.weights.items()}
    current = {n: p.detach() * gates[n] if n in gates else p for n, p in parameters.items()}
    velocity = None

    def loss_at(values, batch):
        output = torch.func.functional_call(net.model, values, batch[:2])
        return 0.5 * (output - batch[2]).square().sum() / len(batch[2])

    for batch in net.training_batches:
        gradients = torch.autograd.grad(loss_at(current, batch), current.values(), create_graph=True)
        velocity = (
            gradients if velocity is None else [0.5 * v + g for v, g in zip(velocity, gradients, strict=True)]
        )
        current = {n: p - 0.1 * v for (n, p), v in zip(current.items(), velocity, strict=True)}
    meta = sum(loss_at(current, batch) for batch in net.probe_batches) / 2
    expected = [g.abs() for g in torch.autograd.grad(meta, gates.values())]
    options = {"num_steps": 3, "learning_rate": 0.1, "momentum": 0.5, "num_probe_batches": 2}
    scores = ProsPr(order="full", **options).score(net)
    for found, wanted in zip(scores.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    first = ProsPr(**options).score(net)
    assert not torch.allclose(flatten(first), flatten(scores), rtol=1e-2)


def test_prospr_without_learning_is_snip():
    for order in ("full", "first_order"):
        scores = ProsPr(order=order, learning_rate=0.0, num_probe_batches=2).score(dense())
        torch.testing.assert_close(flatten(scores), flatten(SNIP(2).score(dense())), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ["full", "first_order"])
def test_everything_moves_in_the_inner_steps_but_pruned_weights(order):
    net = dense()
    masks = top_k({name: w.detach().abs() for name, w in net.weights.items()}, 0.5)
    masks.apply_(net.model)
    biases, zeros = [], []

    def watch(model, batch):
        biases.append(float(model.head.bias[0].detach()))
        zeros.append(sum(model.get_parameter(n)[~m].abs().sum().item() for n, m in masks.items()))
        return squared_error(model, batch)

    net = dense(model=net.model, masks=masks, loss_fn=watch)
    scores = ProsPr(order=order, momentum=0.9, learning_rate=0.1, num_probe_batches=2).score(net)
    assert set(zeros) == {0.0}
    assert len(set(biases[:4])) == 4
    assert not any(scores[name][~mask].any() for name, mask in masks.items())


def test_the_pruned_part_does_not_leak_into_the_meta_gradient():
    """A masked net scores its live weights like the net that never had the others."""
    net = dense()
    masks = Masks({n: torch.ones_like(w, dtype=torch.bool) for n, w in net.weights.items()})
    masks["lidar.weight"][:] = False
    masks.apply_(net.model)
    criterion = ProsPr(order="full", learning_rate=0.1, num_probe_batches=2)
    masked = criterion.score(dense(model=net.model, masks=masks))
    blind = dense(model=net.model, loss_fn=lambda m, b: squared_error(m, (b[0], 0 * b[1], b[2])))
    free = criterion.score(blind)
    for name in ("camera.weight", "head.weight"):
        torch.testing.assert_close(masked[name], free[name], rtol=1e-9, atol=1e-12)


def test_inner_steps_that_diverge_are_explained():
    message = "or lower the learning rate of the criterion if it happened after steps of training"
    net = scalar(loss_fn=squared_error)
    with pytest.raises(ValueError, match=message):
        ProsPr(learning_rate=1e200, num_steps=2, num_probe_batches=2).score(net)


class Layers(nn.Module):
    """One layer in the camera branch, whose input is the batch's first tensor."""

    def __init__(self, layer, count=1):
        super().__init__()
        self.camera, self.lidar, self.count = layer, nn.Linear(2, 1), count

    def forward(self, x, z):
        return sum(self.camera(x).mean() for _ in range(self.count)) + self.lidar(z).mean()


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(3, 4), (2, 5, 3)),
        (nn.Conv1d(3, 2, 3, stride=2, padding=1), (2, 3, 7)),
        (nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2, bias=False), (2, 4, 7, 6)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3)),
        (nn.ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("half", [False, True])
def test_wanda_measures_what_meets_each_weight(layer, size, half):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    batch = (x, torch.randn(2, 2))
    model = Layers(layer)
    if half:
        model, batch = model.bfloat16(), tuple(t.bfloat16() for t in batch)
    net = calibration(model, loss_fn=lambda m, b: m(*b).float(), probe_batches=[batch, batch])
    scores = Wanda(2).score(net)["camera.weight"]
    norm = (2 * inputs_of(layer, batch[0].float().square())).sqrt()
    expected = layer.weight.detach().float().abs() * norm
    torch.testing.assert_close(scores, expected, rtol=1e-2 if half else 1e-5, atol=1e-6)
    assert scores.dtype == torch.float32


def inputs_of(layer, x):
    """Sums over samples and positions of what each weight is multiplied by, one weight at a time."""
    shape = layer.weight.shape
    sums = torch.zeros(shape)
    with torch.no_grad():
        weight, layer = layer.weight.detach().clone(), layer.float()
        bias = layer.bias.clone() if layer.bias is not None else None
        if bias is not None:
            layer.bias.zero_()
        for index in range(sums.numel()):
            layer.weight.zero_().view(-1)[index] = 1.0
            sums.view(-1)[index] = layer(x).sum()
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return sums


def test_wanda_adds_up_calls_of_tied_and_repeated_layers():
    once = Wanda(1).score(wanda_net(count=1))
    twice = Wanda(1).score(wanda_net(count=2))
    torch.testing.assert_close(twice["camera.weight"], once["camera.weight"] * 2**0.5)
    model = Layers(nn.Linear(2, 1))
    model.lidar.weight = model.camera.weight
    batch = torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 1.0]])
    model.head = nn.Linear(2, 1)  # never called
    net = calibration(model, loss_fn=lambda m, b: m(*b), probe_batches=[batch], modalities=TIED)
    scores = Wanda(1).score(net)
    torch.testing.assert_close(
        scores["camera.weight"], model.camera.weight.detach().abs() * torch.tensor([[5.0, 1.0]])
    )
    assert not scores["head.weight"].any()


TIED = {"camera": ["camera"], "other": ["head"]}


def wanda_net(count):
    torch.manual_seed(0)
    batch = torch.ones(2, 3), torch.ones(2, 2)
    return calibration(Layers(nn.Linear(3, 2), count), loss_fn=lambda m, b: m(*b), probe_batches=[batch])


def test_wanda_takes_an_input_by_name_and_leaves_no_hook():
    class Named(Layers):
        def forward(self, x, z):
            return self.camera(input=x).mean() + self.lidar(z).mean()

    model = Named(nn.Linear(3, 2))
    batch = torch.ones(2, 3), torch.ones(2, 2)
    net = calibration(model, loss_fn=lambda m, b: m(*b), probe_batches=[batch])
    torch.testing.assert_close(
        Wanda(1).score(net)["camera.weight"], model.camera.weight.detach().abs() * 2**0.5
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_wanda_refuses_what_is_no_weight_of_a_layer():
    message = (
        "Wanda scores weights of linear and convolution layers of torch, 'camera.0.bias' is none: "
        "exclude it by the pattern '!camera.0.bias' in `prunable`, or use another criterion"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Wanda().score(calibration(prunable=["camera.0.bias"]))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        *(
            (cls, {"num_probe_batches": 0}, "num_probe_batches must be at least 1, got 0")
            for cls in (SNIP, Taylor, GraSP, ProsPr, Wanda)
        ),
        (GraSP, {"hessian": "x"}, "hessian must be one of ['exact', 'finite_difference'], got 'x'"),
        (ProsPr, {"order": "x"}, "order must be one of ['full', 'first_order'], got 'x'"),
        (ProsPr, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (ProsPr, {"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        (ProsPr, {"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        (ProsPr, {"momentum": -0.1}, "momentum must be at least 0, got -0.1"),
        (ProsPr, {"momentum": 1.0}, "momentum must be less than 1, got 1.0"),
    ],
)
def test_impossible_settings_are_named(cls, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(**options)
