"""AlterEva: importance less redundancy, by alternately deactivating modalities.

Source: Sun et al., "AlterMOMA: Fusion Redundancy Pruning for Camera-LiDAR Fusion Models with
Alternative Modality Masking", NeurIPS 2024, arXiv 2409.17728. Equation numbers are the paper's.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from altermoma_pl.contexts import deactivated, noise_free, restored
from altermoma_pl.criteria.base import Calibration, Criterion, Scores
from altermoma_pl.criteria.components import (
    Components,
    Normalization,
    check_contribution,
    group_divisors,
)
from altermoma_pl.criteria.options import check_options
from altermoma_pl.criteria.reactivation import (
    Gradients,
    mean_change,
    mean_gradients,
    mean_loss,
    reactivate,
)
from altermoma_pl.masks import Masks
from altermoma_pl.modality import SHARED


@dataclass(frozen=True)
class AlterEva(Criterion):
    """AlterEva (eq. 11 to 13): DeCI, the contribution of a weight, against ReRI, its redundancy.

    DeCI is |theta * g| with all modalities active. For ReRI one modality at a time is deactivated,
    the rest is trained for a few steps ("reactivation"), and what changes in the gradients of the rest
    is what the deactivated modality had made redundant. `AlterEva.paper()` is the published algorithm
    to the letter; the defaults differ from it: many probe batches instead of one, and ReRI is the
    importance after reactivation and discounts DeCI instead of being subtracted.

    Args:
        alpha: Weight of DeCI.
        beta: Weight of ReRI, shared equally between the deactivations. With "subtract" a negative
            value protects redundancy instead of removing it. "auto": in every event the one of 0, 0.5,
            1, 2, 4 (with "subtract" 0, 0.25, 0.5, 1, 2) with which the pruned model has the lowest loss
            on the probe batches, see `choose_beta`.
        estimator: What ReRI is, with g and g' the gradients of one probe batch before and after
            reactivation: "difference", the paper's |theta * mean(g - g')|; "batch_difference",
            mean |theta * (g - g')|; "reactivated", mean |theta * g'|, the importance after it.
        reduction: DeCI over probe batches: "mean_of_abs", mean |theta * g|, or "abs_of_mean",
            |theta * mean g|.
        combination: "subtract", alpha D - beta R as published, or "discount",
            D * alpha d / (alpha d + beta r) with d and r divided by their means over the group: keeps
            the order of D where there is no redundancy and never goes negative.
        normalization: What D (and with "subtract" R) is divided by in each group: the "mean" or the
            "sum" over its live weights, or "none". The sum favours small groups.
        num_probe_batches: Held-out batches for gradients, K.
        num_reactivation_steps: Training batches for reactivation, B, one step each.
        learning_rate: Of reactivation.
        optimizer: Of reactivation: "sgd", without momentum, or "adam"; neither decays weights.
        gradient_clip: Largest norm of the gradient in a reactivation step; None for no limit.
        noise: "suppressed" keeps running statistics of norm layers and switches dropout off while scoring;
            "as_is" leaves every layer in its mode.
        second_probe: Batches for g': the "same" as for g, or "fresh" ones that follow them.

    Raises:
        ValueError: If a value is outside what is described.
    """

    alpha: float = 1.0
    beta: float | Literal["auto"] = 1.0
    estimator: Literal["difference", "batch_difference", "reactivated"] = "reactivated"
    reduction: Literal["mean_of_abs", "abs_of_mean"] = "mean_of_abs"
    combination: Literal["subtract", "discount"] = "discount"
    normalization: Normalization = "none"
    num_probe_batches: int = 64
    num_reactivation_steps: int = 100
    learning_rate: float = 1e-4
    optimizer: Literal["sgd", "adam"] = "adam"
    gradient_clip: float | None = None
    noise: Literal["suppressed", "as_is"] = "suppressed"  # not "off": YAML reads that as false
    second_probe: Literal["same", "fresh"] = "same"

    def __post_init__(self) -> None:
        if isinstance(self.beta, str) and self.beta != "auto":
            raise ValueError(f"beta must be a number or 'auto', got {self.beta!r}")
        least = {"alpha": -math.inf} if self.beta == "auto" else {"alpha": -math.inf, "beta": -math.inf}
        check_options(self, **least, num_probe_batches=1, num_reactivation_steps=0, learning_rate=0)
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or None, got {self.gradient_clip}")
        self._check_together()

    def _check_together(self) -> None:
        positive = self.alpha > 0 and (self.beta == "auto" or self.beta >= 0)
        if self.combination == "discount" and not positive:
            raise ValueError(
                f"the combination 'discount' needs alpha > 0 and beta >= 0, got alpha={self.alpha}, "
                f"beta={self.beta}; a negative beta needs 'subtract'"
            )
        if self.second_probe == "fresh" and self.estimator == "batch_difference":
            raise ValueError(
                "the estimator 'batch_difference' compares the same batches: second_probe must be 'same'"
            )

    @classmethod
    def paper(cls) -> AlterEva:
        """The published algorithm to the letter: single batches, Adam 1e-4, sums, subtraction.

        The first probe batch is D, the second, fresh one is D_B. The number of steps is not published.
        """
        return cls(
            estimator="difference",
            combination="subtract",
            normalization="sum",
            num_probe_batches=1,
            learning_rate=1e-4,
            optimizer="adam",
            gradient_clip=None,
            noise="as_is",
            second_probe="fresh",
        )

    def score(self, calibration: Calibration) -> Scores:
        """S_i of every prunable weight; minus infinity where it is pruned already."""
        self._fixed_beta()  # before the long work
        return self.combine(self.components(calibration), calibration.masks)

    def components(self, calibration: Calibration) -> Components:
        """Measure DeCI and each ReRI; the model is left as it was, also after an exception.

        Raises:
            TypeError: If a loss is no tensor.
            ValueError: If a loader is empty, a loss is no finite scalar with a gradient, or a gradient
                is not finite.
        """
        model, losses, reri = calibration.model, {}, {}
        # The state to come back to has the layers quiet already, hence this order.
        with noise_free(model) if self.noise == "suppressed" else nullcontext(), restored(model) as reset:
            absolute = self.reduction == "mean_of_abs"
            losses["all"], gradients = mean_gradients(
                calibration,
                calibration.weights,
                self.num_probe_batches,
                "contribution",
                absolute=absolute,
            )
            deci = _times_weight(gradients, calibration)
            for modality in calibration.groups:
                if modality == SHARED:
                    continue
                reset()
                with deactivated(model, calibration.groups[modality]):
                    before, after, change = self._reactivation(calibration, modality)
                losses[f"without_{modality}"] = before
                losses[f"without_{modality}_reactivated"] = after
                reset()
                reri[modality] = _times_weight(change, calibration)
        return Components(deci, reri, dict(calibration.group_of), losses)

    def combine(self, components: Components, masks: Masks | None = None) -> Scores:
        """S_i from stored components, with this object's alpha, beta, combination and normalisation.

        Eq. 11 to 13: a backbone's ReRI counts beta / (M - 1) for each of the other M - 1 modalities,
        that of fusion and heads beta / M for each of the M.

        Args:
            components: What `components` measured.
            masks: What was pruned at that time; sums and means run over live weights only.

        Raises:
            ValueError: If DeCI of a group is zero of which nothing was pruned, or beta is "auto".
        """
        beta = self._fixed_beta()
        check_contribution(components, masks)
        redundancy = self._redundancy(components, masks)
        lead = group_divisors(components.deci, components.group_of, self.normalization, masks)
        means = group_divisors(components.deci, components.group_of, "mean", masks)
        scores = {}
        for name, deci in components.deci.items():
            group, r = components.group_of[name], redundancy[name]
            score = deci / (lead[group] or 1.0)
            if self.combination == "subtract":
                score = self.alpha * score - beta * r
            else:
                d = self.alpha * deci / (means[group] or 1.0)
                score = score * torch.nan_to_num(d / (d + beta * r), nan=0.0)  # 0 / 0: D is 0
            scores[name] = (
                score if masks is None else score.masked_fill(~masks[name].to(score.device), -torch.inf)
            )
        return scores

    def _fixed_beta(self) -> float:
        if self.beta == "auto":
            raise ValueError(
                "beta='auto' depends on the pruned model: choose_beta(criterion, components, calibration, "
                "make_masks) returns the criterion with its beta; AlterMOMACallback calls it in every event"
            )
        return self.beta

    def _reactivation(self, calibration: Calibration, modality: str) -> tuple[float, float, Gradients]:
        """Loss before and after reactivation and the mean change of gradients, by the estimator."""
        others = {n: w for n, w in calibration.weights.items() if calibration.group_of[n] != modality}
        count, label = self.num_probe_batches, f"{modality} deactivated"
        skip = count if self.second_probe == "fresh" else 0

        def train() -> None:
            reactivate(
                calibration, modality, self.num_reactivation_steps, self.optimizer,
                self.learning_rate, self.gradient_clip,
            )  # fmt: skip

        if self.estimator == "difference":
            before, first = mean_gradients(calibration, others, count, label)
            train()
            after, second = mean_gradients(calibration, others, count, f"{label}, reactivated", skip)
            return before, after, {n: first[n] - second[n] for n in others}
        if self.estimator == "batch_difference":
            return mean_change(calibration, others, count, label, train)
        before = mean_loss(calibration, count, label)
        train()
        phase = f"{label}, reactivated"
        after, change = mean_gradients(calibration, others, count, phase, skip, absolute=True)
        return before, after, change

    def _redundancy(self, components: Components, masks: Masks | None) -> dict[str, Tensor]:
        """The mean over deactivations of R_i, normalised within the group."""
        normalization = "mean" if self.combination == "discount" else self.normalization
        parts: dict[str, list[Tensor]] = {name: [] for name in components.deci}
        for modality, reri in components.reri.items():
            divisors = group_divisors(reri, components.group_of, normalization, masks)
            totals = group_divisors(reri, components.group_of, "sum", masks)
            for group, total in totals.items():
                if total == 0:
                    warnings.warn(
                        f"ReRI of the group {group!r} with {modality!r} deactivated is 0: "
                        f"nothing is redundant there, or nothing was reactivated",
                        stacklevel=3,
                    )
            for name, r in reri.items():
                parts[name].append(r / (divisors[components.group_of[name]] or 1.0))
        return {name: torch.stack(each).mean(0) for name, each in parts.items()}


def _times_weight(gradients: Gradients, calibration: Calibration) -> dict[str, Tensor]:
    """|theta_i * x_i| at the weights that the model has now."""
    return {name: (calibration.weights[name].detach() * g).abs() for name, g in gradients.items()}
