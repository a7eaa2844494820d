"""What a criterion is: it scores weights, and knows nothing of how many will stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from altermoma_pl.model.options import check_options
from altermoma_pl.score.calibration import Calibration

Scores = dict[str, Tensor]
"""Parameter name -> score of each weight, higher is kept."""


class Criterion(ABC):
    """Scores weights: which matter, knowing nothing of how many will stay.

    A criterion of your own derives from this class and is named in YAML by its `class_path`. It must
    leave the model as it was, for example by working inside `restored(calibration.model)`. Where several
    processes run, the callback takes the mean over processes of what `score` returns.
    """

    uses_batches = True  # no annotation: it is no option, and jsonargparse cannot resolve ClassVar
    """Whether scores depend on batches; if not, no held-out loader is needed."""

    shardable = False
    """Whether parameters may be sharded over processes, as `DTensor`; scores are sharded alike then."""

    for_channels = False
    """Whether it can score whole channels: it looks at nothing but `calibration.weights` and gradients."""

    @abstractmethod
    def score(self, calibration: Calibration) -> Scores:
        """Parameter name -> score of each weight in `calibration.weights`, higher is kept.

        Scores of weights that `calibration.masks` prunes are ignored.
        """


@dataclass(frozen=True)
class Probing(Criterion):
    """A criterion that takes the mean over held-out batches.

    Args:
        num_probe_batches: Held-out batches that are looked at.
    """

    num_probe_batches: int = 64

    def __post_init__(self) -> None:
        check_options(self, num_probe_batches=1)
