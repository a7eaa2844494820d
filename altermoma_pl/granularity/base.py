"""What a granularity is: what is pruned as one piece, and from scores to masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from altermoma_pl.granularity.channels.calibration import ChannelCalibration
from altermoma_pl.granularity.channels.flops import FlopModel
from altermoma_pl.granularity.channels.groups import Channels
from altermoma_pl.granularity.channels.layouts import Declared
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import Computed, Scope
from altermoma_pl.score import Calibration, Criterion, LossFunction

Sparsity = float | dict[str, float]


@dataclass(frozen=True, eq=False)
class Traced:
    """The channels of a model, the FLOPs of its forward pass, and the groups that no graph could follow."""

    channels: Channels
    flops: FlopModel
    declared: Declared = field(default_factory=dict)


def make_calibration(traced: Traced | None, **fields: Any) -> Calibration:
    """All that a criterion may look at: of channels where they were traced, else of weights."""
    return Calibration(**fields) if traced is None else ChannelCalibration(channels=traced.channels, **fields)


def input_dims(model: nn.Module) -> dict[str, int]:
    """Parameter name -> the dimension of its inputs, of those where it is not 1."""
    transposed = nn.modules.conv._ConvTransposeNd
    return {f"{path}.weight": 0 for path, module in model.named_modules() if isinstance(module, transposed)}


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

    @classmethod
    def of(cls, calibration: Calibration, scope: Scope, min_density: float, traced: Traced | None) -> Ranking:
        """For scores that were measured on a calibration; of equal ones the size of weights decides."""
        model, weights = calibration.model, calibration.weights
        masks = (calibration.masks or Masks.dense(calibration.masked)).to(model)
        sizes = Computed(weights, lambda name: weights[name].detach().abs())
        return cls(masks, calibration.owner_of, scope, min_density, sizes, traced, input_dims(model))


class Granularity(ABC):
    """What is pruned as one piece."""

    by_channel = False
    """Whether scores are those of channels, so that the model must be traced."""

    shardable = False
    """Whether parameters may be sharded over processes."""

    @property
    def share_of(self) -> str:
        """What the sparsity is a share of."""
        return "weights"

    def trace(
        self, model: nn.Module, loss_fn: LossFunction, batches: Iterable[Any], prunable: Sequence[str]
    ) -> Traced | None:
        """The channels of a model, as the loss on the first batch shows them; None where none are pruned."""
        return None

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
        """The share that is pruned already, in what the sparsity counts; for each modality if asked for.

        A target up to this share changes nothing.
        """

    @abstractmethod
    def check_reachable(self, sparsity: Sparsity, ranking: Ranking) -> None:
        """Raise a `ValueError` if floors or earlier masks leave no room for the sparsity."""

    @abstractmethod
    def missing(self, sparsity: Sparsity, ranking: Ranking) -> float:
        """The share that is still to go of what the sparsity counts; 0.0 where nothing is."""


def shares_pruned(
    kept: Mapping[str, int], sizes: Mapping[str, int], group_of: Mapping[str, str]
) -> dict[str, float]:
    """Group -> share that is pruned."""
    left, all_ = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        left[group_of[name]] += kept[name]
        all_[group_of[name]] += size
    return {group: 1 - left[group] / total for group, total in all_.items()}
