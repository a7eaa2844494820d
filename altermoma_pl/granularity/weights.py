"""Single weights, and N of every M."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from altermoma_pl.granularity.base import Granularity, Ranking, Sparsity, shares_pruned
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.n_of_m import check_blocks_left, keep_n_of_m
from altermoma_pl.mask.top_k import Scope, num_kept, top_k
from altermoma_pl.score import Criterion


@dataclass(frozen=True)
class Weight(Granularity):
    """Single weights: the sparsity is the share of weights, exactly."""

    shardable = True

    def check(self, criterion: Criterion, sparsity: Sparsity, scope: Scope, min_density: float) -> None:
        """Everything goes."""

    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """Those with the highest scores."""
        return top_k(
            scores,
            sparsity,
            ranking.scope,
            ranking.masks,
            ranking.min_density,
            ranking.group_of,
            ranking.tie_breaker,
        )

    def pruned(self, ranking: Ranking, by_modality: bool) -> Sparsity:
        """Share of zeros."""
        if not by_modality:
            return ranking.masks.sparsity
        return shares_pruned(
            ranking.masks.counts,
            {name: mask.numel() for name, mask in ranking.masks.items()},
            ranking.group_of,
        )

    def check_reachable(self, sparsity: Sparsity, ranking: Ranking) -> None:
        """How many weights stay does not depend on scores."""
        num_kept(ranking.masks, sparsity, ranking.scope, ranking.min_density, ranking.group_of)

    def missing(self, sparsity: Sparsity, ranking: Ranking) -> float:
        """By the exact count."""
        masks = ranking.masks
        final = num_kept(masks, sparsity, ranking.scope, ranking.min_density, ranking.group_of)
        return (masks.num_kept - final) / masks.num_weights


@dataclass(frozen=True)
class NofM(Weight):
    """N of every M consecutive weights along the inputs of a layer stay, as sparse tensor cores want them.

    The sparsity must be 1 - n / m; earlier events of a schedule prune less of each block. Layers whose inputs
    cannot be divided by m, such as a first one, are an error: leave them out by `prunable`.

    Args:
        n: Weights that stay of each block, at least 1.
        m: Weights of a block, more than n.

    Raises:
        ValueError: If not 1 <= n < m.
    """

    n: int = 2
    m: int = 4

    shardable = False

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 1 <= self.n < self.m:
            raise ValueError(f"N:M needs whole numbers with 1 <= N < M, like 2:4, got {self.n!r}:{self.m!r}")

    def check(self, criterion: Criterion, sparsity: Sparsity, scope: Scope, min_density: float) -> None:
        """N and M say how many stay, and where."""
        final = 1 - self.n / self.m
        if sparsity != final:
            raise ValueError(
                f"{self.n}:{self.m} prunes a share of {final}: set sparsity to that, got {sparsity}"
            )
        if scope != "global":
            raise ValueError(
                f"{self.n}:{self.m} prunes every block alike: choose the scope 'global', got {scope!r}"
            )
        if min_density > 1 - final:
            raise ValueError(
                f"{self.n}:{self.m} keeps {1 - final:g} of each tensor, less than "
                f"min_density={min_density:g}: lower min_density"
            )

    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """The best of each block, and of the rest the best while less is to be pruned."""
        if isinstance(sparsity, dict):
            raise TypeError(f"{self.n}:{self.m} has one sparsity, got {sparsity}")
        return keep_n_of_m(scores, self.n, self.m, sparsity, ranking.masks, _dims(ranking))

    def check_reachable(self, sparsity: Sparsity, ranking: Ranking) -> None:
        """Each block must have enough weights left."""
        check_blocks_left(ranking.masks, self.n, self.m, _dims(ranking))
        super().check_reachable(sparsity, ranking)


def _dims(ranking: Ranking) -> dict[str, int]:
    return {name: dim for name, dim in (ranking.input_dims or {}).items() if name in ranking.masks}
