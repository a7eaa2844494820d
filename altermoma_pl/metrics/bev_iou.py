"""Mean IoU of multi-label bird's-eye-view maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class BEVIoU(Metric):
    """Mean over classes of the IoU at the class's best threshold.

    Classes may overlap: every class has its own binary map. Pixels are summed over the whole set before the
    division. The threshold is chosen on the set that is evaluated, as is customary for this metric, so the
    value is slightly optimistic.

    A class without a single pixel in the targets and without a single predicted pixel at the lowest threshold
    is left out of the mean (BEVFusion's `evaluate_map` counts it as 0; otherwise the two agree). If that
    leaves no class, the mean is 0.

    Args:
        num_classes: Number of classes S.
        thresholds: A cell is predicted where its probability is >= the threshold.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: `num_classes` is below 1, or `thresholds` is empty or leaves (0, 1].

    Example:
        >>> import torch
        >>> metric = BEVIoU(num_classes=1)
        >>> metric.update(torch.tensor([[[[0.9, 0.9]]]]), torch.tensor([[[[1, 0]]]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    tp: Tensor
    fp: Tensor
    fn: Tensor
    thresholds: Tensor

    def __init__(
        self,
        num_classes: int,
        thresholds: Sequence[float] = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds must be one or more numbers in (0, 1], got {thresholds}.")
        self.num_classes = num_classes
        self.register_buffer("thresholds", torch.tensor(sorted(thresholds)), persistent=False)
        for name in ("tp", "fp", "fn"):
            zeros = torch.zeros(num_classes, len(thresholds), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            probabilities: (B, S, nx, ny), in [0, 1].
            target: (B, S, nx, ny), true or non-zero where the class is present.

        Raises:
            ValueError: The shapes differ or do not have S maps.
        """
        if probabilities.ndim != 4 or probabilities.shape[1] != self.num_classes:
            raise ValueError(
                f"probabilities must be (B, {self.num_classes}, nx, ny), got {tuple(probabilities.shape)}."
            )
        if probabilities.shape != target.shape:
            raise ValueError(
                "probabilities and target must have the same shape, "
                f"got {tuple(probabilities.shape)} and {tuple(target.shape)}."
            )
        # In half precision the thresholds would be rounded too, and 0.3496 would reach 0.35.
        probabilities, present = probabilities.float(), target.bool()
        # One threshold at a time: all at once would need seven copies of the maps.
        for column, threshold in enumerate(self.thresholds):
            predicted = probabilities >= threshold
            self.tp[:, column] += (predicted & present).sum(dim=(0, 2, 3))
            self.fp[:, column] += (predicted & ~present).sum(dim=(0, 2, 3))
            self.fn[:, column] += (~predicted & present).sum(dim=(0, 2, 3))

    def compute(self) -> Tensor:
        """Mean IoU over the classes that occur, a scalar in [0, 1]."""
        return self._iou().nanmean().nan_to_num(0.0)

    def per_class(self) -> Tensor:
        """IoU of each class at its best threshold, (S,), over all processes; NaN where `compute` skips it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._iou()

    def _iou(self) -> Tensor:
        union = self.tp + self.fp + self.fn
        best = (self.tp / union.clamp(min=1)).amax(dim=1)
        # Thresholds ascend, so the first column has the most predictions.
        return best.masked_fill(union[:, 0] == 0, torch.nan)
