"""The state that metrics of detections share: a row for each prediction, and the numbers of targets."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RowMetric(Metric):
    """A metric of rows: a prediction's score, its class, and what the metric adds.

    Rows are stored flat and in float32: a process without a single update takes part in the gathering
    with an empty tensor, which torchmetrics makes one-dimensional and float32, and gathering needs the
    same of all processes. The numbers of targets have the given shape, classes first.
    """

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor]
    num_targets: Tensor

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("num_targets", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_rows(self, *columns: Tensor) -> None:
        """Add N rows, of columns (N, ...)."""
        table = torch.cat([column[:, None].flatten(1) for column in columns], dim=1)
        self.rows.append(table.float().flatten().to(self.device))

    def _rows_by_class(self, width: int) -> list[Tensor]:
        """The rows of each class, (N, `width`) by descending score.

        On the CPU, because what is made of them needs float64, which some accelerators lack.
        """
        flat = dim_zero_cat(self.rows).cpu() if len(self.rows) else torch.empty(0)
        rows = flat.reshape(-1, width)
        rows = rows[by_score(rows[:, 0])]
        return [rows[rows[:, 1] == index] for index in range(len(self.num_targets))]


def by_score(scores: Tensor) -> Tensor:
    """Indices by descending score; among equals the larger index first, as on nuScenes."""
    return len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)
