"""SynFlow: keep the paths that carry the most flow, without looking at data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import top_k
from altermoma_pl.model.contexts import noise_free, restored, seed_generators
from altermoma_pl.model.modality import is_constant
from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.linearized import Linearized
from altermoma_pl.score.passes import Labelled, measured

_PHASE = "synaptic flow"


@dataclass(frozen=True)
class SynFlow(Criterion):
    """Synaptic flow |theta * dR/dtheta| of the linearised network with |theta|, pruned in many rounds.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
    flow", NeurIPS 2020, algorithm 1. R is the sum of all outputs for ones at all inputs. So that this
    is right for a trained model of several inputs, the loss runs on one held-out batch inside
    `Linearized`: real geometry and real occupancy of the sensors, but no other data. Each head counts
    the same.

    The rounds shrink the network by the same factor each, down to `density`; flow is computed anew in
    between. The score is the rank of a weight in the order in which they fall, so that any target
    sees the masks of the rounds that lead to it: with the defaults, 50 rounds to a sparsity of 0.9.
    Beyond `density`, the flow of the last survivors decides.

    Args:
        num_iterations: Rounds, each one forward and one backward pass of one batch in float64.
        density: Share of the weights alive that is left after the last round, in (0, 1).
        normalize_heads: Divide the flow out of each head by its total; if not, the widest head dominates.
        balance_modalities: Each modality, and what they share, shrinks by the same factor in a round; if
            not, a branch through which little flows, such as a shallow one beside a deep residual one,
            falls first and may vanish.
    """

    num_iterations: int = 100
    density: float = 0.01
    normalize_heads: bool = True
    balance_modalities: bool = False

    def __post_init__(self) -> None:
        check_options(self, num_iterations=1)
        if not 0 < self.density < 1:
            raise ValueError(f"density must be in (0, 1), got {self.density}")

    def score(self, calibration: Calibration) -> Scores:
        """The rank of every prunable weight, 0 for those pruned already; equal flow has equal ranks."""
        (labelled,) = measured(calibration, "probe", 1, _PHASE)
        masks = (calibration.masks or Masks.dense(calibration.weights)).to(calibration.model)
        groups = calibration.group_of if self.balance_modalities else dict.fromkeys(masks, "all")
        members = {group: [name for name in masks if groups[name] == group] for group in groups.values()}
        alive = {g: 1 - Masks({n: masks[n] for n in own}).sparsity for g, own in members.items()}
        ranks = {name: torch.zeros_like(m, dtype=torch.float64) for name, m in masks.items()}
        highest = 0
        for done in range(self.num_iterations):
            calibration.progress(_PHASE, done, self.num_iterations)
            flow = self.flow(calibration, masks, labelled)[1]
            factor = self.density ** ((done + 1) / self.num_iterations)
            # Not 0: one that is pruned altogether stays so.
            sparsity = {group: 1 - max(density * factor, 1e-15) for group, density in alive.items()}
            kept = top_k(flow, sparsity, "modality", within=masks, groups=groups)
            highest = _rank(ranks, flow, {n: masks[n] & ~kept[n] for n in masks}, highest)
            masks = kept
        calibration.progress(_PHASE, self.num_iterations, self.num_iterations)
        if masks.num_kept:
            _rank(ranks, self.flow(calibration, masks, labelled)[1], masks, highest)
        return {name: ranks[name] for name in calibration.weights}

    def flow(
        self, calibration: Calibration, masks: Masks | None = None, labelled: Labelled | None = None
    ) -> tuple[float, Scores]:
        """R and the flow through every prunable weight, in float64, of the network as masked.

        Args:
            calibration: The model and its batches.
            masks: What is pruned; None for the masks of the calibration.
            labelled: The batch on which the loss runs, with its name; None for the first held-out one.

        Raises:
            ValueError: If no linear layer or convolution with parameters runs, or the flow is not finite.
        """
        if labelled is None:
            (labelled,) = measured(calibration, "probe", 1, _PHASE)
        label, batch = labelled
        masks = masks or calibration.masks or Masks.dense(calibration.weights)
        model, weights = calibration.model, calibration.weights
        with noise_free(model), restored(model), Linearized() as network:
            _make_positive_(calibration, masks)
            seed_generators(calibration.seed)
            loss = calibration.loss_fn(model, batch)  # the graph lives in the layers, not in its value
            heads = network.heads()
            if not heads:
                raise ValueError(
                    f"on {label} no linear layer or convolution runs that depends on a prunable "
                    f"weight: SynFlow needs one; are gradients switched off in the loss function?"
                )
            if self.normalize_heads:  # one that is cut off has a total of 0
                heads = [head / (float(head.detach()) or 1.0) for head in heads]
            total = torch.stack(heads).sum()
            found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            del loss
            flow = {
                name: torch.zeros_like(w.detach()) if g is None else (w.detach() * g).abs()
                for (name, w), g in zip(weights.items(), found, strict=True)
            }
        if not torch.isfinite(total) or not all(bool(torch.isfinite(f).all()) for f in flow.values()):
            raise ValueError(
                f"the synaptic flow is not finite (R = {float(total.detach())}): the network is too deep for "
                f"float64, or holds a function that is not linear for large numbers"
            )
        return float(total.detach()), flow


def _make_positive_(calibration: Calibration, masks: Masks) -> None:
    """Put |theta| in float64 into the parameters and zero into biases; geometry constants stay."""
    for name, parameter in calibration.model.named_parameters():
        leaf = name.rpartition(".")[2]
        value = parameter.detach()
        if name in calibration.weights:
            parameter.data = value.abs().double().masked_fill(~masks[name].to(value.device), 0)
            parameter.requires_grad_()
        elif not is_constant(leaf, parameter):
            parameter.data = (torch.zeros_like(value) if "bias" in leaf else value.abs()).double()


def _rank(ranks: Scores, flow: Scores, which: Masks | dict[str, Tensor], offset: int) -> int:
    """Rank the chosen weights by their flow, from `offset` + 1 on; returns the highest rank."""
    device = next(iter(ranks.values())).device
    chosen = [flow[name][which[name]].to(device) for name in ranks]
    values, places = torch.unique(torch.cat(chosen), return_inverse=True)
    for (name, rank), own in zip(ranks.items(), places.split([len(c) for c in chosen]), strict=True):
        rank[which[name]] = (own + offset + 1).to(rank)
    return offset + len(values)
