"""Whole channels, in all layers that are coupled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.base import Granularity, Ranking, Sparsity, Traced, shares_pruned
from altermoma_pl.granularity.channels.finding import find_channels
from altermoma_pl.granularity.channels.flops import FlopModel
from altermoma_pl.granularity.channels.groups import Kept, owners
from altermoma_pl.granularity.channels.widths import keep_widths
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import Scope
from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.options import check_options
from altermoma_pl.score import Criterion, LossFunction


@dataclass(frozen=True)
class Channel(Granularity):
    """Whole channels, in all layers that are coupled (needs the extra `structured`).

    Masked while training goes on; `slim` and `altermoma export` remove them.

    Args:
        target: Whether the sparsity is a share of the "channels" or of the "flops" of a forward pass. At
            least that share goes, by less than one block of channels more.
        round_to: Widths stay multiples of it, or as they are.
        declared: Groups that no graph can follow, see `find_channels`.

    Raises:
        ValueError: If a value is outside what is described.
    """

    target: Literal["channels", "flops"] = "channels"
    round_to: int = 8
    declared: dict[str, dict[str, str]] | None = None

    by_channel = True

    @property
    def share_of(self) -> str:
        """What the target says."""
        return "FLOPs" if self.target == "flops" else "channels"

    def __post_init__(self) -> None:
        check_options(self, round_to=1)

    def check(self, criterion: Criterion, sparsity: Sparsity, scope: Scope, min_density: float) -> None:
        """The criterion must know nothing of weights, and FLOPs are those of the whole model."""
        if not criterion.for_channels:
            raise ValueError(
                f"{type(criterion).__name__} scores single weights, not channels: choose AlterEva, "
                f"Magnitude, SNIP, Taylor or Random, or one of your own with for_channels = True"
            )
        if scope == "row":
            raise ValueError("the scope 'row' is one of weights: choose 'global', 'modality' or 'layer'")
        if self.target == "flops" and scope != "global":
            raise ValueError(f"FLOPs are those of the whole model: choose the scope 'global', got {scope!r}")

    def trace(
        self, model: nn.Module, loss_fn: LossFunction, batches: Iterable[Any], prunable: Sequence[str]
    ) -> Traced:
        """The channels of a model, which is left as it was; norms and dropout are quiet meanwhile.

        Raises:
            ModuleNotFoundError, ValueError: As `find_channels`, or if there is no batch.
        """
        batch = next(iter(batches), None)
        if batch is None:
            raise ValueError("there is no probe batch: at least one is needed to follow channels")

        def forward(model: nn.Module) -> Tensor:
            return loss_fn(model, batch)

        with noise_free(model):
            channels = find_channels(model, forward, list(prunable), self.declared)
            with restored(model):
                return Traced(channels, FlopModel(model, forward, channels), self.declared or {})

    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """The channels with the highest scores."""
        return _traced(ranking).channels.to_masks(self._kept(scores, sparsity, ranking), ranking.masks)

    def _kept(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Kept:
        traced = _traced(ranking)
        before, kept = traced.channels.kept(ranking.masks), Kept()
        steps = {name: group.step(self.round_to) for name, group in traced.channels.items()}
        cost = traced.flops if self.target == "flops" else None
        scope_of = self._scope_of(ranking)
        for label in dict.fromkeys(scope_of.values()):
            competing = {name: scores[name] for name, own in scope_of.items() if own == label}
            share = sparsity[label] if isinstance(sparsity, dict) else sparsity
            kept |= keep_widths(competing, share, steps, ranking.min_density, before, cost)
        return kept

    def pruned(self, ranking: Ranking, by_modality: bool) -> Sparsity:
        """Share of channels or FLOPs, the smallest of all scopes: blocks may take more of another."""
        traced = _traced(ranking)
        widths = {name: int(flags.sum()) for name, flags in traced.channels.kept(ranking.masks).items()}
        if self.target == "flops":
            return 1 - traced.flops(widths) / traced.flops.total
        sizes = {name: group.num_channels for name, group in traced.channels.items()}
        if by_modality:
            return shares_pruned(widths, sizes, owners(traced.channels, ranking.group_of))
        return min(shares_pruned(widths, sizes, self._scope_of(ranking)).values())

    def check_reachable(self, sparsity: Sparsity, ranking: Ranking) -> None:
        """How wide layers stay depends on scores, whether they can be narrow enough does not."""
        equal = {name: torch.zeros(group.num_channels) for name, group in _traced(ranking).channels.items()}
        self._kept(equal, sparsity, ranking)

    def missing(self, sparsity: Sparsity, ranking: Ranking) -> float:
        """Of the scope, or the modality, that lacks most."""
        pruned, wanted = _by_group(self.pruned(ranking, isinstance(sparsity, dict))), _by_group(sparsity)
        missing = max(wanted[name] - share for name, share in pruned.items())
        return missing if missing > 1e-12 else 0.0

    def _scope_of(self, ranking: Ranking) -> dict[str, str]:
        """Group -> what its channels compete in."""
        channels = _traced(ranking).channels
        if ranking.scope == "layer":
            return {name: name for name in channels}
        if ranking.scope == "modality":
            return owners(channels, ranking.group_of)
        return dict.fromkeys(channels, "")


def _by_group(sparsity: Sparsity) -> dict[str, float]:
    """Group -> share, with "" for one share of all."""
    return sparsity if isinstance(sparsity, dict) else {"": sparsity}


def _traced(ranking: Ranking) -> Traced:
    if ranking.traced is None:
        raise ValueError("the channels are not known: the model was not traced")
    return ranking.traced
