"""AlterEva: importance less redundancy, by alternately deactivating modalities.

Source: Sun et al., "AlterMOMA: Fusion Redundancy Pruning for Camera-LiDAR Fusion Models with
Alternative Modality Masking", NeurIPS 2024, arXiv 2409.17728. Equation numbers are the paper's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.contexts import deactivated, noise_free, restored, seed_generators
from altermoma_pl.model.modality import SHARED
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration, Gradients
from altermoma_pl.score.combination import (
    Components,
    Level,
    Normalization,
    check_contribution,
    discount,
    group_divisors,
    leading,
    live_counts,
    redundancy,
    tensor_means,
)
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.passes import (
    batch_gradients,
    mean_gradients,
    mean_loss,
    mean_over_processes,
    measured,
    without_pruned,
)


@dataclass(frozen=True)
class AlterEva(Criterion):
    """AlterEva (eq. 11 to 13): DeCI, the contribution of a weight, against ReRI, its redundancy.

    DeCI is |theta * g| with all modalities active. For ReRI one modality at a time is deactivated,
    the rest is trained for a few steps ("reactivation"), and what changes in the gradients of the rest
    is what the deactivated modality had made redundant. `AlterEva.paper()` is the published algorithm
    to the letter; the defaults are what did best in `examples/RESULTS.md`: many probe batches instead
    of one; the geometric mean of DeCI and the weight's magnitude leads; ReRI is the importance after
    reactivation, judged by whole tensors; where it exceeds DeCI by half, relative to their means over
    the group, it discounts the leading score instead of being subtracted from it.

    Args:
        alpha: Weight of DeCI. With "discount" it is a tolerance: how far ReRI may exceed DeCI, both relative
            to their means over the group, before it counts as redundancy.
        beta: Weight of ReRI, shared equally between the deactivations; with "discount" an exponent. A
            negative value protects redundancy instead of removing it. "auto": in every event the one of
            0, 1, 2, 3, 4 (with "subtract" 0, 0.25, 0.5, 1, 2) with which the pruned model has the lowest
            loss on the probe batches, see `choose_beta`.
        estimator: What ReRI is, with g and g' the gradients of one probe batch before and after
            reactivation: "difference", the paper's |theta * mean(g - g')|, or "reactivated",
            mean |theta * g'|, the importance after it.
        reduction: DeCI over probe batches: "mean_of_abs", mean |theta * g|, or "abs_of_mean",
            |theta * mean g|.
        magnitude_share: Exponent s of the leading score L = D^(1 - s) |theta|^s: 0 for DeCI itself, 1/2 for
            |theta| sqrt(mean |g|), 1 for the magnitude.
        combination: "subtract", alpha L - beta R, as published with L = D, or "discount",
            L * min(1, alpha d / r)^beta with d and r, D and R, divided by their means over the group: keeps
            the order of L where nothing is redundant and never goes negative.
        redundancy_level: Whether redundancy, and what it is compared with, is that of each "weight" or the
            mean over its "tensor", which is less noisy.
        normalization: What L (and with "subtract" R) is divided by in each group: the "mean" or the
            "sum" over its live weights, or "none". The sum favours small groups.
        num_probe_batches: Held-out batches for gradients, K; several processes share them.
        num_reactivation_steps: Steps of reactivation, B, one training batch each, of every process.
        learning_rate: Of reactivation.
        optimizer: Of reactivation: "sgd", without momentum, or "adam"; neither decays weights.
        gradient_clip: Largest norm of the gradient in a reactivation step; None for no limit.
        noise: "suppressed" keeps running statistics of norm layers and switches dropout off while scoring;
            "as_is" leaves every layer in its mode.
        second_probe: Batches for g': the "same" as for g, or "fresh" ones that follow them.
    """

    alpha: float = 1.5
    beta: float | Literal["auto"] = 3.0
    estimator: Literal["difference", "reactivated"] = "reactivated"
    reduction: Literal["mean_of_abs", "abs_of_mean"] = "mean_of_abs"
    magnitude_share: float = 0.5
    combination: Literal["subtract", "discount"] = "discount"
    redundancy_level: Level = "tensor"
    normalization: Normalization = "none"
    num_probe_batches: int = 64
    num_reactivation_steps: int = 100
    learning_rate: float = 3e-4
    optimizer: Literal["sgd", "adam"] = "adam"
    gradient_clip: float | None = None
    noise: Literal["suppressed", "as_is"] = "suppressed"  # not "off": YAML reads that as false
    second_probe: Literal["same", "fresh"] = "same"

    shardable = True
    for_channels = True

    def __post_init__(self) -> None:
        if isinstance(self.beta, str) and self.beta != "auto":
            raise ValueError(f"beta must be a number or 'auto', got {self.beta!r}")
        check_options(self, num_probe_batches=1, num_reactivation_steps=0, learning_rate=0)
        if not 0 <= self.magnitude_share <= 1:
            raise ValueError(f"magnitude_share must be in [0, 1], got {self.magnitude_share}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip must be positive or None, got {self.gradient_clip}")
        if self.combination == "discount" and not self.alpha > 0:
            raise ValueError(f"the combination 'discount' needs alpha > 0, got alpha={self.alpha}")

    @classmethod
    def paper(cls) -> AlterEva:
        """The published algorithm to the letter: single batches, Adam 1e-4, sums, subtraction.

        The first probe batch is D, the second, fresh one is D_B. The number of steps is not published.
        """
        return cls(
            alpha=1.0,
            beta=1.0,
            estimator="difference",
            magnitude_share=0.0,
            combination="subtract",
            redundancy_level="weight",
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
        return self.combine(self.components(calibration), calibration.alive)

    def components(self, calibration: Calibration) -> Components:
        """Measure DeCI and each ReRI; the model is left as it was, also after an exception.

        Raises:
            TypeError, ValueError: If a loader is empty, or a loss no finite scalar with finite gradients.
        """
        model, reri = calibration.model, {}
        losses = {"all": 0.0}  # the first entry, although it is measured last
        # The state to come back to has the layers quiet already, hence this order.
        with noise_free(model) if self.noise == "suppressed" else nullcontext(), restored(model) as reset:
            for modality in calibration.groups:
                if modality == SHARED:
                    continue
                with deactivated(model, calibration.groups[modality]):
                    before, after, change = self._reactivation(calibration, modality)
                losses[f"without_{modality}"] = before
                losses[f"without_{modality}_reactivated"] = after
                reset()
                change = _times_weight_(change, calibration)
                if self.redundancy_level == "tensor":
                    change = tensor_means(change, live_counts(change, calibration.alive))
                reri[modality] = change
            # Last, because training of the rest needs the most memory.
            weights, absolute = calibration.weights, self.reduction == "mean_of_abs"
            losses["all"], gradients = mean_gradients(
                calibration, weights, self.num_probe_batches, "contribution", absolute=absolute
            )
            deci = _times_weight_(gradients, calibration)
            reset()
            magnitude = {name: weight.detach().abs() for name, weight in weights.items()}
        return Components(deci, reri, dict(calibration.group_of), losses, magnitude, self.redundancy_level)

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
        beta, level, subtract = self._fixed_beta(), self.redundancy_level, self.combination == "subtract"
        live, group_of = live_counts(components.deci, masks), components.group_of
        check_contribution(components, live)
        first = leading(components, self.magnitude_share)
        divisors = group_divisors(first, group_of, self.normalization, live)
        if subtract:
            second = redundancy(components, self.normalization, level, live)
        else:
            second = discount(components, self.alpha, beta, level, live)
        scores = {}
        for name in first:
            lead = first[name] / divisors[group_of[name]]
            # A number goes with tensors on any device, sharded ones too.
            other = second[name].item() if level == "tensor" else second[name]
            scores[name] = self.alpha * lead - beta * other if subtract else lead * other
        if masks is None:
            return scores
        return {name: s.masked_fill_(~masks[name].to(s.device), -torch.inf) for name, s in scores.items()}

    def _fixed_beta(self) -> float:
        if self.beta == "auto":
            raise ValueError(
                "beta='auto' depends on the pruned model: choose_beta(criterion, components, calibration, "
                "make_masks) returns the criterion with its beta; AlterMOMACallback calls it in every event"
            )
        return self.beta

    def _reactivation(self, calibration: Calibration, modality: str) -> tuple[float, float, Gradients]:
        """Loss before and after reactivation, and the mean of what ReRI multiplies, by the estimator."""
        others = {n: w for n, w in calibration.weights.items() if calibration.group_of[n] != modality}
        count, label = self.num_probe_batches, f"{modality} deactivated"
        first = None
        if self.estimator == "difference":
            before, first = mean_gradients(calibration, others, count, label)
        else:
            before = mean_loss(calibration, count, label)
        self._reactivate_(calibration, modality)
        skip = count if self.second_probe == "fresh" else 0
        after, second = mean_gradients(
            calibration, others, count, f"{label}, reactivated", skip, absolute=first is None
        )
        return before, after, second if first is None else {n: first[n] - second[n] for n in others}

    def _reactivate_(self, calibration: Calibration, modality: str) -> None:
        """Train everything but the deactivated modality, one step for each training batch.

        The deactivated parameters are not given to the optimizer: Adam and weight decay would move them
        although their gradient is zero. Pruned weights stay zero.
        """
        if self.num_reactivation_steps == 0:
            return
        seed_generators(calibration.seed)
        inactive = set(calibration.groups[modality])
        parameters = calibration.model.named_parameters()
        trained = {n: p for n, p in parameters if p.requires_grad and n not in inactive}
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained.values(), self.learning_rate)
        else:
            # Fused where it exists: the other kinds need room for two more copies of a tensor, or of all.
            fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained.values())
            optimizer = torch.optim.Adam(trained.values(), self.learning_rate, fused=fused)
        phase = f"{modality} deactivated, reactivation"
        measure = partial(batch_gradients, calibration, of=trained)
        for _, gradients in measured(calibration, "training", self.num_reactivation_steps, phase, measure):
            own = mean_over_processes(calibration, gradients, trained)
            for name in list(own):
                trained[name].grad = without_pruned(calibration, name, own.pop(name))
            if self.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), self.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()  # it is part of a cycle: its moments would stay until those are collected


def _times_weight_(gradients: Gradients, calibration: Calibration) -> dict[str, Tensor]:
    """|theta_i * x_i| at the weights that the model has now, in place."""
    return {n: g.mul_(calibration.weights[n].detach()).abs_() for n, g in gradients.items()}
