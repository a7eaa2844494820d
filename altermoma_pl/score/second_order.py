"""GraSP and ProsPr: criteria that differentiate the gradient once more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from altermoma_pl.model.contexts import noise_free, restored, seed_generators
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration, Gradients, LossAndGradients, Weights
from altermoma_pl.score.criterion import Criterion, Probing, Scores
from altermoma_pl.score.linearized import upstream
from altermoma_pl.score.passes import (
    Labelled,
    accumulators,
    batch_gradients,
    mean_gradients,
    mean_over_processes,
    measured,
    without_pruned,
)

_Step = tuple[Labelled, Gradients]  # the batch of an inner step, and the parameters before it


def hessian_product(
    calibration: Calibration, label: str, batch: Any, of: Weights, vector: Gradients, instead: str
) -> LossAndGradients:
    """The loss on a batch and H v by differentiating g v once more (Pearlmutter 1994).

    H is taken between the parameters `of`, for which there is a `vector`; those that g v does not reach are
    left out. Where an operation cannot be differentiated twice, the message proposes the option `instead`.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
        loss, gradients = batch_gradients(calibration, label, batch, of, create_graph=True)
        terms = [(g * vector[name]).sum() for name, g in gradients.items() if g.requires_grad]
        if not terms:  # the loss is linear in these parameters
            return loss, {}
        value = torch.stack(terms).sum()
        try:
            # `once_differentiable` leaves a node that raises, but none that leads to the parameters:
            # autograd would pass it over, and the result would lack a part.
            if any(node.name() == "torch::autograd::Error" for node in upstream([value.grad_fn])):
                raise RuntimeError("a function is marked with @once_differentiable")
            found = torch.autograd.grad(value, list(of.values()), allow_unused=True)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("derivative", "once_differentiable")):
                raise
            raise RuntimeError(
                f"an operation of the model cannot be differentiated twice ({error}): use {instead}"
            ) from error
    return loss, {name: h for name, h in zip(of, found, strict=True) if h is not None}


@dataclass(frozen=True)
class GraSP(Probing):
    """Gradient signal preservation theta * (H g), with its sign: what adds to |g|^2 is kept.

    Source: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR
    2020, eq. 8, whose score is the negative of this one. g and H are means over the same batches and
    taken over the prunable weights that are alive. The paper's temperature is left out: it has a
    meaning for a softmax only.

    Args:
        num_probe_batches: Held-out batches; each is used twice or, with differences, three times.
        hessian: "exact" differentiates twice; "finite_difference" needs only gradients and sees the
            kinks of ReLU, Hg = (g(theta + eps g) - g(theta - eps g)) / 2 eps with
            eps = 1e-3 |theta| / |g| (more in half precision, whose rounding would swallow that).
    """

    num_probe_batches: int = 8
    hessian: Literal["exact", "finite_difference"] = "exact"

    def score(self, calibration: Calibration) -> Scores:
        """The score theta * (H g) of every prunable weight.

        Raises:
            RuntimeError: If an operation cannot be differentiated twice and `hessian` is "exact".
        """
        weights, model = calibration.weights, calibration.model
        means = partial(mean_gradients, calibration, weights, self.num_probe_batches)
        with noise_free(model), restored(model):
            _, vector = means("gradients")
            vector = {name: without_pruned(calibration, name, g) for name, g in vector.items()}
            if self.hessian == "finite_difference":
                products = _by_differences(weights, vector, lambda: means("curvature")[1])
            else:
                instead = "hessian='finite_difference'"
                measure = partial(hessian_product, calibration, of=weights, vector=vector, instead=instead)
                _, products = means("curvature", measure=measure)
            return {name: weights[name].detach() * h for name, h in products.items()}


def _by_differences(weights: Weights, vector: Gradients, gradients: Callable[[], Gradients]) -> Gradients:
    length = _norm(vector)
    if length == 0:
        return accumulators(weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    precision = max(torch.finfo(weight.dtype).eps for weight in before.values())
    step = max(1e-3, math.sqrt(precision)) * _norm(before) / length
    sides = []
    for sign in (step, -step):
        _load_(weights, {name: value + sign * vector[name] for name, value in before.items()})
        sides.append(gradients())
    return {name: (after - sides[1][name]) / (2 * step) for name, after in sides[0].items()}


def _norm(tensors: dict[str, Tensor]) -> float:
    """Of all elements together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@dataclass(frozen=True)
class ProsPr(Criterion):
    """|theta_0 * dL(theta_M)/dtheta_0|, where M steps of SGD lead from theta_0 to theta_M.

    Source: Alizadeh et al., "Prospect Pruning: Finding Trainable Weights at Initialization using
    Meta-Gradients", ICLR 2022. Unlike there the weights are trained ones, inner steps take training
    batches while the meta-loss L is the mean over held-out ones, and norm layers use their running
    statistics. All trainable parameters move; weights that are pruned stay zero.

    Args:
        order: "full" differentiates through the steps, by their adjoint recursion: one more pass with
            double backward and one copy of the parameters for each step; "first_order" takes
            dtheta_M / dtheta_0 for the identity.
        num_steps: Inner steps M.
        learning_rate: Of the inner steps; that of the training is a good choice.
        momentum: Of the inner steps, in [0, 1).
        new_batches: A new training batch for each inner step; if not, the first one for all.
        detach_first_buffer: With momentum, leave the derivative of the first step out, as the authors'
            code does.
        num_probe_batches: Held-out batches of the meta-loss.
    """

    order: Literal["full", "first_order"] = "first_order"
    num_steps: int = 3
    learning_rate: float = 1e-3
    momentum: float = 0.0
    new_batches: bool = True
    detach_first_buffer: bool = False
    num_probe_batches: int = 64

    def __post_init__(self) -> None:
        check_options(self, num_steps=1, learning_rate=0, momentum=0, num_probe_batches=1)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be less than 1, got {self.momentum}")

    def score(self, calibration: Calibration) -> Scores:
        """The meta-gradient times the weight, absolute, of every prunable weight.

        Raises:
            RuntimeError: If an operation cannot be differentiated twice and `order` is "full".
            ValueError: As `batch_gradients`, for example if the inner steps diverge.
        """
        model, weights = calibration.model, calibration.weights
        with noise_free(model), restored(model):
            initial = {name: weight.detach().clone() for name, weight in weights.items()}
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            steps = self._train(calibration, trained)
            of = trained if self.order == "full" else weights
            _, gradients = mean_gradients(calibration, of, self.num_probe_batches, "meta-gradients")
            if self.order == "full":
                gradients = self._pull_back(calibration, trained, steps, gradients)
            return {name: (weight * gradients[name]).abs() for name, weight in initial.items()}

    def _train(self, calibration: Calibration, trained: Weights) -> list[_Step]:
        """Take the inner steps in place: m <- momentum m + g, theta <- theta - learning_rate m."""
        count = self.num_steps if self.new_batches else 1
        batches: Iterable[Labelled] = measured(calibration, "training", count, "inner steps")
        if not self.new_batches:
            batches = list(batches) * self.num_steps
        steps: list[_Step] = []
        buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}
        for index, labelled in enumerate(batches):
            seed_generators(calibration.seed + index)
            if self.order == "full":
                steps.append((labelled, {name: p.detach().clone() for name, p in trained.items()}))
            _, gradients = batch_gradients(calibration, *labelled, trained)
            gradients = mean_over_processes(calibration, gradients, trained)
            for name, buffer in buffers.items():
                buffer.mul_(self.momentum)
                if name in gradients:
                    buffer.add_(without_pruned(calibration, name, gradients[name]))
            _load_(trained, {n: p.detach() - self.learning_rate * buffers[n] for n, p in trained.items()})
        return steps

    def _pull_back(
        self, calibration: Calibration, trained: Weights, steps: list[_Step], adjoint: Gradients
    ) -> Gradients:
        """From dL/dtheta_M to dL/dtheta_0.

        With lambda_k = dL/dtheta_k and nu_k = dL/dm_k, backwards from nu_{M+1} = 0:
        nu_{k+1} = momentum nu_{k+2} - learning_rate lambda_{k+1}, lambda_k = lambda_{k+1} + H_k nu_{k+1}.
        """
        velocity = {name: torch.zeros_like(value) for name, value in adjoint.items()}
        for index, (labelled, parameters) in reversed(list(enumerate(steps))):
            velocity = {n: self.momentum * v - self.learning_rate * adjoint[n] for n, v in velocity.items()}
            if index == 0 and self.detach_first_buffer and self.momentum > 0:
                continue
            _load_(trained, parameters)
            seed_generators(calibration.seed + index)  # as the step was taken
            vector = {name: without_pruned(calibration, name, v) for name, v in velocity.items()}
            _, products = hessian_product(calibration, *labelled, trained, vector, "order='first_order'")
            products = mean_over_processes(calibration, products, trained)
            adjoint = {n: a + products[n] if n in products else a for n, a in adjoint.items()}
        return adjoint


@torch.no_grad()
def _load_(parameters: Weights, values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
