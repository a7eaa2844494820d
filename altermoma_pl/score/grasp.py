"""GraSP: keep what carries the flow of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.curvature import hessian_product
from altermoma_pl.score.passes import Gradients, Weights, accumulators, mean_gradients


@dataclass(frozen=True)
class GraSP(Criterion):
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

    Raises:
        ValueError: If a value is outside what is described.
    """

    num_probe_batches: int = 8
    hessian: Literal["exact", "finite_difference"] = "exact"

    def __post_init__(self) -> None:
        check_options(self, num_probe_batches=1)

    def score(self, calibration: Calibration) -> Scores:
        """The score theta * (H g) of every prunable weight.

        Raises:
            RuntimeError: If an operation cannot be differentiated twice and `hessian` is "exact".
        """
        weights = calibration.weights
        with noise_free(calibration.model), restored(calibration.model):
            gradients = self._gradients(calibration, "gradients")
            if calibration.masks is not None:
                gradients = {n: g * calibration.masks[n].to(g.device) for n, g in gradients.items()}
            measure = self._exact if self.hessian == "exact" else self._by_differences
            products = measure(calibration, gradients)
            return {name: weights[name].detach() * h for name, h in products.items()}

    def _gradients(self, calibration: Calibration, phase: str) -> Gradients:
        return mean_gradients(calibration, calibration.weights, self.num_probe_batches, phase)[1]

    def _exact(self, calibration: Calibration, vector: Gradients) -> Gradients:
        def products(label: str, batch: Any, of: Weights) -> tuple[float, Gradients]:
            return hessian_product(calibration, label, batch, of, vector, "hessian='finite_difference'")

        return mean_gradients(
            calibration, calibration.weights, self.num_probe_batches, "curvature", measure=products
        )[1]

    def _by_differences(self, calibration: Calibration, vector: Gradients) -> Gradients:
        weights = calibration.weights
        length = _norm(vector)
        if length == 0:
            return accumulators(weights)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        precision = max(torch.finfo(weight.dtype).eps for weight in before.values())
        step = max(1e-3, math.sqrt(precision)) * _norm(before) / length
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name] + sign * step * vector[name])
            sides.append(self._gradients(calibration, "curvature"))
        return {name: (after - sides[1][name]) / (2 * step) for name, after in sides[0].items()}


def _norm(tensors: dict[str, Tensor]) -> float:
    """Of all elements together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
