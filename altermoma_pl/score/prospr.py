"""ProsPr: sensitivity seen through a few steps of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from altermoma_pl.model.contexts import noise_free, restored, seed_generators
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.curvature import hessian_product
from altermoma_pl.score.passes import Gradients, Weights, mean_gradients, mean_over_processes


@dataclass(frozen=True)
class _Step:
    """What one inner step saw."""

    label: str
    batch: Any
    parameters: dict[str, Tensor]


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

    Raises:
        ValueError: If a value is outside what is described.
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
            ValueError: As `Calibration.gradients`, for example if the inner steps diverge.
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
        steps: list[_Step] = []
        buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}
        for index, (label, batch) in enumerate(self._batches(calibration)):
            seed_generators(calibration.seed + index)
            if self.order == "full":
                copies = {name: p.detach().clone() for name, p in trained.items()}
                steps.append(_Step(label, batch, copies))
            _, gradients = calibration.gradients(label, batch, trained)
            gradients = _alive(mean_over_processes(calibration, gradients, trained), calibration)
            for name, buffer in buffers.items():
                buffer.mul_(self.momentum)
                if name in gradients:
                    buffer.add_(gradients[name])
            _load_(trained, {n: p.detach() - self.learning_rate * buffers[n] for n, p in trained.items()})
        return steps

    def _batches(self, calibration: Calibration) -> Iterable[tuple[str, Any]]:
        if self.new_batches:
            return calibration.trainings(self.num_steps, "inner steps")
        return list(calibration.trainings(1, "inner steps")) * self.num_steps

    def _pull_back(
        self, calibration: Calibration, trained: Weights, steps: list[_Step], adjoint: Gradients
    ) -> Gradients:
        """From dL/dtheta_M to dL/dtheta_0.

        With lambda_k = dL/dtheta_k and nu_k = dL/dm_k, backwards from nu_{M+1} = 0:
        nu_{k+1} = momentum nu_{k+2} - learning_rate lambda_{k+1}, lambda_k = lambda_{k+1} + H_k nu_{k+1}.
        """
        velocity = {name: torch.zeros_like(value) for name, value in adjoint.items()}
        for index, step in reversed(list(enumerate(steps))):
            velocity = {n: self.momentum * v - self.learning_rate * adjoint[n] for n, v in velocity.items()}
            if index == 0 and self.detach_first_buffer and self.momentum > 0:
                continue
            _load_(trained, step.parameters)
            seed_generators(calibration.seed + index)  # as the step was taken
            _, products = hessian_product(
                calibration, step.label, step.batch, trained, _alive(velocity, calibration),
                "order='first_order'",
            )  # fmt: skip
            products = mean_over_processes(calibration, products, trained)
            adjoint = {n: a + products[n] if n in products else a for n, a in adjoint.items()}
        return adjoint


def _alive(values: Gradients, calibration: Calibration) -> Gradients:
    """The values, zero where weights are pruned: those do not move."""
    masks = calibration.masks
    if masks is None:
        return values
    return {n: v.masked_fill(~masks[n].to(v.device), 0) if n in masks else v for n, v in values.items()}


@torch.no_grad()
def _load_(parameters: Weights, values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
