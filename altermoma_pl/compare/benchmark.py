"""What a comparison needs to know: a problem to compare on, and the methods to compare."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.granularity import Granularity, parse_granularity
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.mask.top_k import Scope, check_density
from altermoma_pl.score import Criterion

Direction = Literal["higher", "lower"]
Values = dict[str, float]
"""Name of what was measured -> its value."""


class Benchmark(ABC):
    """A problem on which criteria are compared: trains a dense model per seed, prunes it, measures it.

    A benchmark of your own derives from this class and is named in YAML by its `class_path`. Make it a
    frozen dataclass: its `repr` is its identity, by which dense models and results are found again.
    Everything must depend on nothing but the fields and the seed; a field that changes no result, such
    as a folder of cached data, is left out of the `repr` by `field(repr=False)`.
    """

    @property
    @abstractmethod
    def modalities(self) -> Mapping[str, Sequence[str]]:
        """Modality -> patterns over module paths of the LightningModule."""

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Direction]:
        """What the tables and figures are about, by the names that are measured, most important first."""

    @property
    def prunable(self) -> Sequence[str]:
        """Patterns that add to or remove from the prunable weights, as for the callback."""
        return ()

    @abstractmethod
    def train_dense(self, seed: int, folder: Path) -> Values:
        """Train the dense model, save it in `folder` (empty, exists), and measure it."""

    @abstractmethod
    def prune(self, seed: int, folder: Path, callback: AlterMOMACallback, num_epochs: int) -> Values:
        """Fit the dense model of `folder` with the callback for `num_epochs`, and measure it.

        Nothing may be written to `folder`.
        """


@dataclass(frozen=True)
class Method:
    """A row of the comparison: a criterion, and where it departs from the common options.

    Args:
        criterion: Scores the weights.
        schedule: When to prune; None for the comparison's.
        num_epochs: Length of pruning and fine-tuning; None for the comparison's.
        scope: Over what weights compete; None for the comparison's.
        min_density: Floor of each tensor; None for the comparison's.
        granularity: What is pruned as one piece; None for the comparison's.

    Raises:
        ValueError: If a value is out of range.
    """

    criterion: Criterion
    schedule: Schedule | None = None
    num_epochs: int | None = None
    scope: Scope | None = None
    min_density: float | None = None
    granularity: str | Granularity | None = None

    def __post_init__(self) -> None:
        if self.num_epochs is not None and self.num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {self.num_epochs}")
        if self.scope is not None and self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {list(get_args(Scope))}, got {self.scope!r}")
        if self.min_density is not None:
            check_density(self.min_density)
        if self.granularity is not None:
            parse_granularity(self.granularity)


def identity(thing: object) -> str:
    """The `repr` of a benchmark or method, which must say all that it is.

    Raises:
        ValueError: If it holds a memory address instead.
    """
    text = repr(thing)
    if re.search(r" at 0x[0-9a-f]+", text):
        raise ValueError(
            f"{text} does not say what it was made with, so its results could not be told from others': "
            f"make its class a dataclass, or give it a __repr__"
        )
    return text
