"""Detections matched by centre distance on the ground plane: average precision, nuScenes' metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from altermoma_pl.metrics.detections import (
    ERRORS,
    UNKNOWN,
    Boxes,
    RowMetric,
    box_errors,
    checked_boxes,
    checked_distances,
    match,
    mean_errors,
    mean_precision,
)


class CentreDistanceAP(RowMetric):
    """Detection average precision, matched by the 2D distance of centres as on nuScenes.

    Per class and distance, predictions are taken by descending score. Each takes the closest ground truth of
    its frame and class that is still free, and is a true positive if that one is strictly nearer than the
    distance. Precision is interpolated on 101 recall points; the part with recall and precision above 10 %
    is averaged and scaled to [0, 1]. A frame must come whole, in one update, which matches it.

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
        self, num_classes: int, distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0), **kwargs: Any
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
        own = checked_boxes("predictions", "centres", 2, num, centres, classes, scores, frames)
        goals = checked_boxes("targets", "centres", 2, num, target_centres, target_classes, target_frames)
        found, targets = Boxes(own, classes, frames), Boxes(goals, target_classes, target_frames)
        scores = scores.detach().float()  # as they are stored: ties must be the same in both places
        self._add_rows(scores, classes, match(found, scores, targets, self.distances) >= 0)
        self.num_targets += torch.bincount(target_classes, minlength=num)

    def compute(self) -> Tensor:
        """Mean over distances and the classes that occur in the ground truth, a scalar; 0 if none does."""
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


@dataclass(frozen=True)
class DetectionClass:
    """How one class is evaluated.

    Args:
        name: Its name.
        max_range: Boxes count if their centre is nearer to the origin than this, in metres.
        yaw_period: Turning by this angle, in radians, changes nothing; None: the class has no yaw.
        moves: Whether velocity and attribute mean something.

    Raises:
        ValueError: `max_range` is not positive, or `yaw_period` not in (0, 2 pi].
    """

    name: str
    max_range: float = math.inf
    yaw_period: float | None = 2 * math.pi
    moves: bool = True

    def __post_init__(self) -> None:
        if not self.max_range > 0:
            raise ValueError(f"max_range of {self.name!r} must be positive, got {self.max_range}.")
        if self.yaw_period is not None and not 0 < self.yaw_period <= 2 * math.pi:
            raise ValueError(
                f"yaw_period of {self.name!r} must lie in (0, 2 pi] or be None, got {self.yaw_period}."
            )


NUSCENES_CLASSES = (
    DetectionClass("car", 50.0),
    DetectionClass("truck", 50.0),
    DetectionClass("bus", 50.0),
    DetectionClass("trailer", 50.0),
    DetectionClass("construction_vehicle", 50.0),
    DetectionClass("pedestrian", 40.0),
    DetectionClass("motorcycle", 40.0),
    DetectionClass("bicycle", 40.0),
    DetectionClass("traffic_cone", 30.0, yaw_period=None, moves=False),
    DetectionClass("barrier", 30.0, yaw_period=math.pi, moves=False),
)


class NuScenesDetection(RowMetric):
    """MAP, true-positive errors and NDS by the rules of the nuScenes detection task.

    AP is that of `CentreDistanceAP`. Errors are those of the true positives at `error_distance`:

    - ate: distance of the centres on the ground, m
    - ase: 1 - IoU of the two boxes if centre and yaw were the same
    - aoe: difference of the yaws, rad
    - ave: length of the difference of the velocities, m/s
    - aae: 1 - accuracy of the attribute

    Each is a running mean over the true positives by descending score, averaged over the recalls from 11 %
    to the highest one reached; 1 if that one is not above 10 %. An error is a mean over the classes to which
    it applies. With n errors e, the score is (n mAP + sum of max(0, 1 - e)) / 2n: `nds` if all five are
    known, else `nds_3` of the first three, which is not comparable to NDS.

    As in the official evaluation, and other than in `CentreDistanceAP`, a class without ground truth counts,
    with AP 0 and errors 1: name only classes that occur. An error that applies to no class is NaN, and so is
    a score made of it. The official evaluation also drops bicycles and motorcycles in bicycle racks; leave
    them out of the update. A frame must come whole, in one update, which matches it.

    Source: Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020,
    section 3.1, and the configuration `detection_cvpr_2019`.

    Args:
        classes: The C classes; a class's index is its number in `update`.
        velocity: Whether boxes have velocities; otherwise ave is left out.
        attributes: Whether `update` is given attributes; otherwise aae is left out.
        distances: Matching distances of AP in metres.
        error_distance: The one of `distances` at which errors are taken.
        max_predictions: Most predictions that a frame may have.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: No classes or twice the same name, `distances` is empty or not positive,
            `error_distance` is not among them, or `max_predictions` is below 1.

    Example:
        >>> import torch
        >>> metric = NuScenesDetection([DetectionClass("Car", 50.0)], velocity=False, attributes=False)
        >>> box, zero = torch.tensor([[10.0, 2.0, 0.5, 4.0, 2.0, 1.5, 0.0]]), torch.tensor([0])
        >>> shift = torch.tensor([0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2])
        >>> metric.update(box + shift, torch.tensor([0.9]), zero, zero, box, zero, zero)
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'nds_3': 0.725, 'map': 0.75, 'ate': 0.7, 'ase': 0.0, 'aoe': 0.2}
    """

    def __init__(
        self,
        classes: Sequence[DetectionClass] = NUSCENES_CLASSES,
        velocity: bool = True,
        attributes: bool = True,
        distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
        error_distance: float = 2.0,
        max_predictions: int = 500,
        **kwargs: Any,
    ) -> None:
        names = [entry.name for entry in classes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"classes must be one or more with different names, got {names}.")
        distances = checked_distances(distances)
        if error_distance not in distances:
            raise ValueError(
                f"error_distance must be one of the distances {distances}, got {error_distance}."
            )
        if max_predictions < 1:
            raise ValueError(f"max_predictions must be at least 1, got {max_predictions}.")
        super().__init__(len(names), **kwargs)
        self.classes = tuple(classes)
        self.velocity, self.attributes = velocity, attributes
        self.distances, self.error_distance = distances, error_distance
        self.max_predictions = max_predictions
        known = {"ave": velocity, "aae": attributes}
        self.errors = tuple(name for name in ERRORS if known.get(name, True))

    def update(
        self,
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        frames: Tensor,
        target_boxes: Tensor,
        target_classes: Tensor,
        target_frames: Tensor,
        target_points: Tensor | None = None,
        attributes: Tensor | None = None,
        target_attributes: Tensor | None = None,
    ) -> None:
        """Match the predictions of whole frames.

        Boxes are x, y, z, three sizes (in the same order on both sides), yaw, and, if the metric has
        velocities, their x and y: metres, radians, m/s, in the frame of the vehicle, whose origin
        ranges are measured from. Further columns are ignored. An unknown velocity of a target is NaN.

        Args:
            boxes: (P, 7 or more), with velocities (P, 9 or more).
            scores: (P,), higher is more certain.
            classes: (P,), integers in [0, C).
            frames: (P,), integers that tell the frames of this update apart.
            target_boxes: (M, 7 or more), with velocities (M, 9 or more).
            target_classes: (M,), integers in [0, C).
            target_frames: (M,), as `frames`.
            target_points: (M,), LiDAR and radar points in the box; boxes with 0 are left out.
            attributes: (P,), integers.
            target_attributes: (M,), integers, -1 where the target has none.

        Raises:
            ValueError: The tensors of one side differ in length, a class is out of range, boxes are not
                finite or have sizes that are not positive, a frame has more than `max_predictions`
                predictions, or attributes are given or missing against the metric's `attributes`.
        """
        if any((given is not None) != self.attributes for given in (attributes, target_attributes)):
            raise ValueError(
                f"The metric was made with attributes={self.attributes}, so attributes and "
                f"target_attributes must {'both' if self.attributes else 'not'} be given."
            )
        found = self._checked("predictions", boxes, classes, frames, scores, attributes)
        others = target_points, target_attributes
        targets = self._checked("targets", target_boxes, target_classes, target_frames, *others)
        ordered, most = frames.sort().values, self.max_predictions
        crowded = ordered[most:][ordered[most:] == ordered[:-most]]
        if len(crowded):
            raise ValueError(
                f"A frame may have at most {most} predictions, but frame {int(crowded[0])} has more: keep "
                "those of the highest scores, or raise max_predictions."
            )
        counts, kept = self._in_range(targets), self._in_range(found)
        if target_points is not None:
            counts &= target_points != 0
        found, targets = found.take(kept), targets.take(counts)
        scores = scores[kept].detach().float()  # as they are stored: ties must be the same in both places
        taken = match(found, scores, targets, self.distances)
        periods = scores.new_tensor([entry.yaw_period or 2 * math.pi for entry in self.classes])
        pair = taken[:, self.distances.index(self.error_distance)]
        hit = pair >= 0
        errors = scores.new_full((len(scores), len(ERRORS)), torch.nan)
        errors[hit] = box_errors(found.take(hit), targets.take(pair[hit]), periods[found.classes[hit]])
        self._add_rows(scores, found.classes, taken >= 0, errors)
        self.num_targets += torch.bincount(targets.classes, minlength=len(self.classes))

    def compute(self) -> dict[str, Tensor]:
        """Means over the classes, over all processes.

        Returns:
            Scalars `nds` or `nds_3`, `map`, `ate`, `ase`, `aoe`, and if known `ave` and `aae`.
        """
        table = self._table()
        precision = table.pop("ap").mean()
        errors = {name: values.nanmean() for name, values in table.items()}
        score, terms = ("nds", ERRORS) if errors.keys() == set(ERRORS) else ("nds_3", ERRORS[:3])
        credit = torch.stack([(1 - errors[name]).clamp(min=0) for name in terms]).sum()
        return {score: (len(terms) * precision + credit) / (2 * len(terms)), "map": precision, **errors}

    def per_class(self) -> dict[str, Tensor]:
        """`ap`, mean over distances, and the errors of each class, (C,) each, over all processes.

        NaN marks the errors that do not apply to a class, which `compute` leaves out.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._table()

    def _table(self) -> dict[str, Tensor]:
        widths = [2, len(self.distances), len(ERRORS)]
        table = []
        for rows, entry, num in zip(
            self._rows_by_class(sum(widths)), self.classes, self.num_targets.tolist(), strict=True
        ):
            first, matched, errors = torch.split(rows, widths, dim=1)
            at = matched[:, self.distances.index(self.error_distance)].bool()
            means = mean_errors(at, first[:, 0], errors, num).float()
            applies = torch.tensor([True, True, entry.yaw_period is not None, entry.moves, entry.moves])
            table.append([mean_precision(matched, num), *means.where(applies, torch.nan)])
        columns = (torch.stack(values).to(self.device) for values in zip(*table, strict=True))
        named = dict(zip(("ap", *ERRORS), columns, strict=True))
        return {name: named[name] for name in ("ap", *self.errors)}

    def _in_range(self, side: Boxes) -> Tensor:
        limits = side.boxes.new_tensor([entry.max_range for entry in self.classes])
        return side.boxes[:, 0].hypot(side.boxes[:, 1]) < limits[side.classes]

    def _checked(
        self, side: str, boxes: Tensor, classes: Tensor, frames: Tensor, *others: Tensor | None
    ) -> Boxes:
        """Those of one side; the last of the others are the attributes."""
        width, num, attributes = 9 if self.velocity else 7, len(self.classes), others[-1]
        checked = checked_boxes(side, "boxes", width, num, boxes, classes, frames, *others)
        if not (boxes[:, :7].isfinite().all() and (boxes[:, 3:6] > 0).all()):
            raise ValueError(
                f"Boxes of the {side} must be finite with positive sizes (columns 3 to 5), got {boxes}."
            )
        if attributes is None:
            attributes = torch.full_like(classes, UNKNOWN)
        return Boxes(checked, classes, frames, attributes)
