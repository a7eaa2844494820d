"""Average precision by centre distance on the ground plane."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from altermoma_pl.metrics.matching import (
    average_precision,
    by_score,
    centre_distance,
    check_side,
    flat_rows,
    greedy_match,
    read_rows,
)


class CentreDistanceAP(Metric):
    """Detection average precision, matched by the 2D distance of centres as on nuScenes.

    Per class and distance, predictions are taken by descending score. Each takes the closest
    ground truth of its frame and class that is still free, and is a true positive if that one is
    strictly nearer than the distance. Precision is interpolated on 101 recall points; the part
    with recall and precision above 10 % is averaged and scaled to [0, 1].

    Matching concerns one frame at a time, so it is done in `update`; a frame must therefore come
    whole, in one update.

    Args:
        num_classes: Number of classes C.
        distances: Matching distances in metres.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: `num_classes` is below 1, or `distances` is empty or not positive.

    Example:
        >>> import torch
        >>> metric = CentreDistanceAP(num_classes=1)
        >>> centre, zero = torch.tensor([[10.0, 2.0]]), torch.tensor([0])
        >>> metric.update(centre + 0.7, torch.tensor([0.9]), zero, zero, centre, zero, zero)
        >>> metric.compute()  # 0.99 m away: a match at 1, 2 and 4 m
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    rows: list[Tensor]  # score, class, 1 or 0 per distance where it is a true positive
    num_targets: Tensor

    def __init__(
        self,
        num_classes: int,
        distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if not distances or min(distances) <= 0:
            raise ValueError(f"distances must be one or more positive numbers, got {distances}.")
        self.num_classes = num_classes
        self.distances = tuple(distances)
        self.add_state("rows", [], dist_reduce_fx="cat")
        zeros = torch.zeros(num_classes, dtype=torch.int64)
        self.add_state("num_targets", zeros, dist_reduce_fx="sum")

    def update(
        self,
        centres: Tensor,
        scores: Tensor,
        classes: Tensor,
        frames: Tensor,
        target_centres: Tensor,
        target_classes: Tensor,
        target_frames: Tensor,
    ) -> None:
        """Match the predictions of whole frames.

        Args:
            centres: (P, 2 or more), x and y of the predictions first. Boxes can be passed whole.
            scores: (P,), higher is more certain.
            classes: (P,), integers in [0, C).
            frames: (P,), integers that tell the frames of this update apart.
            target_centres: (M, 2 or more), x and y of the ground truth first.
            target_classes: (M,), integers in [0, C).
            target_frames: (M,), as `frames`.

        Raises:
            ValueError: The tensors of one side differ in length, or a class is out of range.
        """
        num = self.num_classes
        check_side("predictions", "centres", centres, 2, classes, (scores, frames), num)
        check_side("targets", "centres", target_centres, 2, target_classes, (target_frames,), num)
        distance = centre_distance(centres, classes, frames, target_centres, target_classes, target_frames)
        scores = scores.detach().float()  # as they are stored: ties must be the same in both places
        taken = greedy_match(distance, scores, self.distances)
        self.rows.append(flat_rows(scores, classes, taken >= 0))
        self.num_targets += torch.bincount(target_classes, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Mean over distances and over the classes that occur in the ground truth, a scalar.

        Without any ground truth it is 0.
        """
        return self._ap().nanmean().nan_to_num(0.0)

    def per_class(self) -> Tensor:
        """AP of each class, mean over distances, (C,), over all processes.

        NaN marks the classes without ground truth, which `compute` leaves out.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._ap()

    def _ap(self) -> Tensor:
        rows = read_rows(self.rows, 2 + len(self.distances))
        rows = rows[by_score(rows[:, 0])]
        values = [
            torch.stack([average_precision(m, num) for m in rows[rows[:, 1] == c, 2:].T]).mean()
            if num
            else torch.tensor(torch.nan)
            for c, num in enumerate(self.num_targets.tolist())
        ]
        return torch.stack(values).to(self.num_targets.device)
