"""Average precision by centre distance on the ground plane."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altermoma_pl.metrics.matching import checked_boxes, checked_distances, match, mean_precision
from altermoma_pl.metrics.rows import RowMetric


class CentreDistanceAP(RowMetric):
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

    higher_is_better = True

    def __init__(
        self,
        num_classes: int,
        distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
        **kwargs: Any,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        super().__init__(num_classes, **kwargs)
        self.num_classes = num_classes
        self.distances = checked_distances(distances)

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
        found = checked_boxes("predictions", "centres", 2, num, centres, classes, frames, scores)
        targets = checked_boxes("targets", "centres", 2, num, target_centres, target_classes, target_frames)
        scores = scores.detach().float()  # as they are stored: ties must be the same in both places
        self._add_rows(scores, classes, match(found, scores, targets, self.distances) >= 0)
        self.num_targets += torch.bincount(target_classes, minlength=num)

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
        rows, counts = self._rows_by_class(2 + len(self.distances)), self.num_targets.tolist()
        values = [mean_precision(own[:, 2:], num) for own, num in zip(rows, counts, strict=True)]
        return torch.stack(values).to(self.device).masked_fill(self.num_targets == 0, torch.nan)
