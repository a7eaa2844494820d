"""What is pruned as one piece: a weight, a block of N:M, or a channel; from scores to masks for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from altermoma_pl.contexts import noise_free, restored
from altermoma_pl.criteria import Criterion
from altermoma_pl.criteria.computed import Computed
from altermoma_pl.masks import Masks
from altermoma_pl.options import check_type
from altermoma_pl.patterns import Pattern, keep_n_of_m
from altermoma_pl.sparsity import Scope, top_k
from altermoma_pl.structured import Channels, FlopModel, Kept, find_channels, keep_widths, owners
from altermoma_pl.structured.tracing import Forward

Sparsity = float | dict[str, float]


@dataclass(frozen=True, eq=False)
class Traced:
    """The channels of a model, and what they compute."""

    channels: Channels
    flops: FlopModel


@dataclass(frozen=True, eq=False)
class Ranking:
    """What scores are ranked within.

    Args:
        masks: What earlier events left.
        group_of: Masked parameter -> its modality or "shared".
        scope: Over what scores compete.
        min_density: Share of each tensor, or group of channels, that stays whatever its scores.
        tie_breaker: Second scores, of weights.
        traced: The channels, where those are pruned.
        input_dims: Parameter name -> its dimension of inputs, 1 if left out, for blocks of those.
    """

    masks: Masks
    group_of: Mapping[str, str]
    scope: Scope
    min_density: float
    tie_breaker: Mapping[str, Tensor] | None = None
    traced: Traced | None = None
    input_dims: Mapping[str, int] | None = None


class Granularity(ABC):
    """What is pruned as one piece."""

    by_channel = False
    """Whether scores are those of channels, so that the model must be traced."""

    def trace(self, model: nn.Module, forward: Forward, prunable: list[str]) -> Traced:
        """The channels of a model, where those are pruned."""
        raise NotImplementedError(f"{type(self).__name__} needs no channels")

    @abstractmethod
    def check(self, criterion: Criterion, sparsity: Sparsity, scope: Scope, min_density: float) -> None:
        """Raise a `ValueError` if these cannot go together."""

    @abstractmethod
    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """What stays.

        Raises:
            ValueError: If scores are not finite, or the sparsity cannot be reached.
        """

    @abstractmethod
    def pruned(self, ranking: Ranking, by_modality: bool) -> Sparsity:
        """The share that is pruned already, in what the sparsity counts; for each modality if asked for."""

    @abstractmethod
    def shortfall(self, sparsity: Sparsity, ranking: Ranking) -> str:
        """What is missing to the sparsity, in words; empty if nothing is.

        Raises:
            ValueError: If it can never be reached.
        """


@dataclass(frozen=True)
class Weight(Granularity):
    """Single weights: the sparsity is the share of weights, exactly."""

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
        return _shares(ranking.masks.counts, _sizes(ranking.masks), ranking.group_of)

    def shortfall(self, sparsity: Sparsity, ranking: Ranking) -> str:
        """By the exact count, which does not depend on scores."""
        masks = ranking.masks
        equal = Computed(masks, lambda name: torch.zeros_like(masks[name], dtype=torch.float32))
        final = self.masks(equal, sparsity, ranking).num_kept
        kept = masks.num_kept
        return f"{kept} weights are left, and the target keeps {final}" if kept > final else ""


@dataclass(frozen=True)
class NofM(Weight):
    """N of every M consecutive weights along the inputs of a layer stay, as sparse tensor cores want them.

    The sparsity must be 1 - n / m; earlier events of a schedule prune less, within the pattern. Layers whose
    inputs cannot be divided by m, such as a first one, are an error: leave them out by `prunable`.

    Args:
        n: Weights that stay of each block.
        m: Weights of a block.

    Raises:
        ValueError: If not 1 <= n < m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        Pattern(self.n, self.m)

    def check(self, criterion: Criterion, sparsity: Sparsity, scope: Scope, min_density: float) -> None:
        """The pattern says how many stay, and where."""
        pattern = Pattern(self.n, self.m)
        if sparsity != pattern.sparsity:
            raise ValueError(
                f"{pattern} prunes a share of {pattern.sparsity:g}: set sparsity to that, got {sparsity}"
            )
        if scope != "global":
            raise ValueError(f"{pattern} prunes every block alike: choose the scope 'global', got {scope!r}")
        if min_density > 1 - pattern.sparsity:
            raise ValueError(
                f"{pattern} keeps {1 - pattern.sparsity:g} of each tensor, min_density={min_density:g}"
            )

    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """The best of each block; the worst of all while less than the pattern is pruned."""
        if isinstance(sparsity, dict):
            raise TypeError(f"a pattern has one sparsity, got {sparsity}")
        dims = {name: dim for name, dim in (ranking.input_dims or {}).items() if name in scores}
        return keep_n_of_m(scores, Pattern(self.n, self.m), sparsity, ranking.masks, dims)


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

    def __post_init__(self) -> None:
        check_type("target", self.target, Literal["channels", "flops"])
        check_type("round_to", self.round_to, int)
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")

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

    def trace(self, model: nn.Module, forward: Forward, prunable: list[str]) -> Traced:
        """The channels of a model, which is left as it was; norms and dropout are quiet meanwhile.

        Raises:
            ModuleNotFoundError, ValueError: As `find_channels`.
        """
        with noise_free(model):
            channels = find_channels(model, forward, prunable, self.declared)
            with restored(model):
                return Traced(channels, FlopModel(model, forward, channels))

    def masks(self, scores: Mapping[str, Tensor], sparsity: Sparsity, ranking: Ranking) -> Masks:
        """The channels with the highest scores."""
        traced = _traced(ranking)
        before, kept = traced.channels.kept(ranking.masks), Kept()
        steps = {name: group.step(self.round_to) for name, group in traced.channels.items()}
        cost = traced.flops if self.target == "flops" else None
        for names, share in self._scopes(sparsity, ranking):
            own = {name: scores[name] for name in names}
            within = {name: before[name] for name in names}
            kept |= keep_widths(own, share, steps, ranking.min_density, within, cost)
        return traced.channels.to_masks(kept, ranking.masks)

    def pruned(self, ranking: Ranking, by_modality: bool) -> Sparsity:
        """Share of channels or FLOPs."""
        traced = _traced(ranking)
        widths = {name: int(flags.sum()) for name, flags in traced.channels.kept(ranking.masks).items()}
        if self.target == "flops":
            return 1 - traced.flops(widths) / traced.flops.total
        sizes = {name: group.num_channels for name, group in traced.channels.items()}
        if by_modality:
            return _shares(widths, sizes, owners(traced.channels, ranking.group_of))
        return 1 - sum(widths.values()) / sum(sizes.values())

    def shortfall(self, sparsity: Sparsity, ranking: Ranking) -> str:
        """By the shares."""
        channels = _traced(ranking).channels
        self.masks({name: torch.zeros(g.num_channels) for name, g in channels.items()}, sparsity, ranking)
        pruned, wanted = _by_group(self.pruned(ranking, isinstance(sparsity, dict))), _by_group(sparsity)
        short = [
            f"{share:.4g}{name and f' of {name}'}"
            for name, share in pruned.items()
            if share < wanted[name] - 1e-12
        ]
        what = "FLOPs" if self.target == "flops" else "channels"
        return (
            f"a share of {', '.join(short)} of the {what} is pruned, the target is {sparsity}"
            if short
            else ""
        )

    def _scopes(self, sparsity: Sparsity, ranking: Ranking) -> Iterator[tuple[list[str], float]]:
        names, shares = list(_traced(ranking).channels), _by_group(sparsity)
        if ranking.scope == "layer":
            yield from (([name], shares[""]) for name in names)
        elif ranking.scope == "modality":
            owner = owners(_traced(ranking).channels, ranking.group_of)
            for group in dict.fromkeys(owner.values()):
                share = shares.get(group, shares.get("", 0.0))
                yield [name for name in names if owner[name] == group], share
        else:
            yield names, shares[""]


def parse_granularity(value: str | Granularity) -> Granularity:
    """Strings "weight", "channel" and "N:M" with their defaults, or an object as it is.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, Granularity):
        return value
    if value == "weight":
        return Weight()
    if value == "channel":
        return Channel()
    if isinstance(value, str) and ":" in value:
        pattern = Pattern.parse(value)
        return NofM(pattern.n, pattern.m)
    raise ValueError(
        f"granularity must be 'weight', 'channel', a pattern such as '2:4' (in quotes: YAML reads a number), "
        f"or an object of Weight, NofM or Channel, got {value!r}"
    )


def input_dims(model: nn.Module) -> dict[str, int]:
    """Parameter name -> the dimension of its inputs, of those where it is not 1."""
    transposed = nn.modules.conv._ConvTransposeNd
    return {f"{path}.weight": 0 for path, module in model.named_modules() if isinstance(module, transposed)}


def _by_group(sparsity: Sparsity) -> dict[str, float]:
    """Group -> share, with "" for one share of all."""
    return sparsity if isinstance(sparsity, dict) else {"": sparsity}


def _traced(ranking: Ranking) -> Traced:
    if ranking.traced is None:
        raise ValueError("the channels are not known: the model was not traced")
    return ranking.traced


def _sizes(masks: Masks) -> dict[str, int]:
    return {name: mask.numel() for name, mask in masks.items()}


def _shares(
    kept: Mapping[str, int], sizes: Mapping[str, int], group_of: Mapping[str, str]
) -> dict[str, float]:
    """Group -> share that is pruned."""
    left: dict[str, int] = {}
    all_: dict[str, int] = {}
    for name, size in sizes.items():
        group = group_of[name]
        left[group] = left.get(group, 0) + kept[name]
        all_[group] = all_.get(group, 0) + size
    return {group: 1 - left[group] / total for group, total in all_.items()}
