"""KITTI's average precision of 2D, bird's-eye-view and 3D boxes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altermoma_pl.metrics.detections import RowMetric
from altermoma_pl.metrics.kitti_rules import (
    DIFFICULTIES,
    KITTI_CLASSES,
    KITTI_TYPES,
    MIN_OVERLAP,
    OTHER,
    VALID,
    KittiDetections,
    KittiTargets,
    detection_flags,
    dont_care_share,
    match_frame,
    overlaps,
    recall_precision,
    target_flags,
)


class KittiAP(RowMetric):
    """Average precision of Car, Pedestrian and Cyclist by the rules of the KITTI benchmark.

    The measures "2d", "bev" and "3d" need an overlap above .7 for Car, .5 for Pedestrian and
    Cyclist; "bev_loose" and "3d_loose" above .5 and .25. Each gives AP at 11 recall points (until
    2019) and at 40, for objects that are easy, moderate or hard to see.

    Three habits of the benchmark are kept: with n < 41 valid objects a perfect detector does not reach 1
    (n = 25 gives .636 at 11 points and .6 at 40), so look at `num_valid`; without any valid object AP is 0;
    and minimum heights in the image (40, 25, 25 pixels) are meant for images 1242 pixels wide. For smaller
    images, pass their width / 1242 as `height_scale`, and say so where you report the result.

    A frame must come whole, in one update, which matches it; frames in any order and on any process.

    Boxes are in the rectified camera's frame, as in a label file. A LiDAR box (x, y, z, length, width,
    height, yaw) becomes one by moving its CENTRE to that frame and then y += height / 2,
    rotation_y = -yaw - pi / 2. Its 2D box is the extent of its projected corners, clipped to the image.

    Args:
        measures: Which of "2d", "bev", "3d", "bev_loose", "3d_loose" to compute.
        height_scale: Factor on the minimum heights; 1 is official.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: `measures` is empty or has one twice or an unknown one; `height_scale` is 0 or less.

    Example:
        >>> import torch
        >>> from altermoma_pl.metrics import KittiDetections, KittiTargets, kitti_types
        >>> box = torch.tensor([[1.5, 1.6, 4.0, 0.0, 1.7, 20.0, 0.0]]).repeat(50, 1)
        >>> box2d = torch.tensor([[500.0, 150.0, 640.0, 210.0]]).repeat(50, 1)
        >>> types, frames, zero = kitti_types(["Car"] * 50), torch.arange(50), torch.zeros(50)
        >>> metric = KittiAP(measures=["3d"])
        >>> metric.update(
        ...     KittiDetections(box, box2d, torch.rand(50), types, frames),
        ...     KittiTargets(box, box2d, zero, zero, types, frames),
        ... )
        >>> metric.compute()["car_3d_r40_moderate"]
        tensor(1.)
    """

    higher_is_better = True

    def __init__(
        self, measures: Sequence[str] = tuple(MIN_OVERLAP), height_scale: float = 1.0, **kwargs: Any
    ) -> None:
        if not measures or len(set(measures)) < len(measures) or not set(measures) <= set(MIN_OVERLAP):
            raise ValueError(f"measures must be one or more of {tuple(MIN_OVERLAP)}, got {measures}.")
        if not height_scale > 0:
            raise ValueError(f"height_scale must be above 0, got {height_scale}.")
        super().__init__(len(KITTI_CLASSES), len(DIFFICULTIES), **kwargs)
        self.measures = tuple(measures)
        self.height_scale = height_scale

    def update(self, detections: KittiDetections, targets: KittiTargets) -> None:
        """Match the detections of whole frames.

        Args:
            detections: P detections. Scores are compared in float32.
            targets: M objects. A frame without any is known by its detections.

        Raises:
            ValueError: A tensor has another shape than its side's others, a type is out of range, or
                a score is not finite.
        """
        _check_columns("detections", detections)
        _check_columns("targets", targets)
        if not detections.scores.isfinite().all():
            raise ValueError("Scores of the detections must be finite, got NaN or infinity.")
        # On the CPU: float64 is not to be had everywhere, and the steps are many and small.
        detections = KittiDetections(*(tensor.detach().cpu() for tensor in detections))
        targets = KittiTargets(*(tensor.detach().cpu() for tensor in targets))
        detections = detections._replace(scores=detections.scores.float())
        for frame in {*detections.frames.tolist(), *targets.frames.tolist()}:
            found, there = detections.frames == frame, targets.frames == frame
            self._update_frame(
                KittiDetections(*(tensor[found] for tensor in detections)),
                KittiTargets(*(tensor[there] for tensor in targets)),
            )

    def _update_frame(self, detections: KittiDetections, targets: KittiTargets) -> None:
        overlap = overlaps(self.measures, targets, detections)
        share = dont_care_share(targets, detections)
        limits = torch.tensor([MIN_OVERLAP[measure] for measure in self.measures], dtype=torch.float64)
        only_2d = torch.tensor([measure == "2d" for measure in self.measures])
        for index, kind in enumerate(KITTI_CLASSES):
            of_targets = target_flags(targets, kind, self.height_scale)
            flags = detection_flags(detections, kind, self.height_scale)
            self.num_targets[index] += (of_targets == VALID).sum(dim=1).to(self.device)
            rows = (of_targets != OTHER).any(dim=0).nonzero().squeeze(1)
            columns = (flags != OTHER).any(dim=0).nonzero().squeeze(1)
            if not len(columns):
                continue
            part, limit = overlap[:, rows][:, :, columns], limits[:, index]
            changes = match_frame(
                part > limit[:, None, None],
                part,
                detections.scores[columns],
                (share[columns] > limit[:, None]) & only_2d[:, None],
                of_targets[:, rows],
                flags[:, columns],
            )
            kept = changes.flatten(1).any(dim=1)
            scores = detections.scores[columns][kept]
            self._add_rows(scores, torch.full_like(scores, index), changes[kept])

    def compute(self) -> dict[str, Tensor]:
        """AP in [0, 1] by class, measure, number of recall points and difficulty.

        Keys are like `car_3d_r40_moderate` or `cyclist_bev_loose_r11_easy`. KITTI prints percent.
        """
        shape = (len(self.measures), len(DIFFICULTIES), 3)
        values = {}
        for kind, rows, counts in zip(
            KITTI_CLASSES, self._rows_by_class(2 + math.prod(shape)), self.num_targets.tolist(), strict=True
        ):
            changes = rows[:, 2:].reshape(-1, *shape)
            for column, measure in enumerate(self.measures):
                for level, (difficulty, count) in enumerate(zip(DIFFICULTIES, counts, strict=True)):
                    ap = recall_precision(rows[:, 0], changes[:, column, level], count)
                    for name, value in zip(("r11", "r40"), ap, strict=True):
                        key = f"{kind.lower()}_{measure}_{name}_{difficulty}"
                        values[key] = torch.tensor(value, device=self.device)
        return values

    def num_valid(self) -> dict[str, int]:
        """Number of valid objects over all processes, by keys like `car_moderate`."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            counts = self.num_targets.tolist()
        return {
            f"{kind.lower()}_{difficulty}": count
            for kind, row in zip(KITTI_CLASSES, counts, strict=True)
            for difficulty, count in zip(DIFFICULTIES, row, strict=True)
        }


def _check_columns(side: str, given: KittiDetections | KittiTargets) -> None:
    columns = {"boxes": (7,), "boxes2d": (4,)}
    for name, tensor in given._asdict().items():
        expected = (len(given.types), *columns.get(name, ()))
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} of the {side} must have shape {expected}, as there are {len(given.types)} "
                f"types, got {tuple(tensor.shape)}."
            )
    types = given.types
    if len(types) and not 0 <= int(types.min()) <= int(types.max()) < len(KITTI_TYPES):
        raise ValueError(
            f"types of the {side} must lie in [0, {len(KITTI_TYPES)}), "
            f"got {int(types.min())} to {int(types.max())}; see kitti_types."
        )
