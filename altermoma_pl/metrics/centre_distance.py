"""Average precision by centre distance on the ground plane."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RECALL_POINTS = 101
FIRST_POINT = 11  # recalls up to 10 % are noise and do not count
MIN_PRECISION = 0.1


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

    scores: list[Tensor]
    classes: list[Tensor]
    matched: list[Tensor]
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
        for name in ("scores", "classes", "matched"):
            self.add_state(name, [], dist_reduce_fx="cat")
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
        self._check("predictions", centres, classes, (scores, frames))
        self._check("targets", target_centres, target_classes, (target_frames,))
        offset = centres[:, None, :2].float() - target_centres[:, :2].float()  # (P, M, 2)
        distance = offset.norm(dim=2)
        same = (classes[:, None] == target_classes) & (frames[:, None] == target_frames)
        distance = distance.masked_fill(~same, torch.inf)
        self.scores.append(scores.detach())
        self.classes.append(classes)
        self.matched.append(greedy_match(distance, scores, self.distances))
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
        # On the CPU because the interpolation needs float64, which some accelerators lack.
        num_targets = self.num_targets.tolist()
        if not self.scores:
            return torch.tensor([0.0 if num else torch.nan for num in num_targets])
        classes = dim_zero_cat(self.classes).cpu()
        matched = dim_zero_cat(self.matched).cpu().bool()
        order = _by_score(dim_zero_cat(self.scores).cpu())
        classes, matched = classes[order], matched[order]
        values = [
            torch.stack([average_precision(m, num) for m in matched[classes == c].T]).mean()
            if num
            else torch.tensor(torch.nan)
            for c, num in enumerate(num_targets)
        ]
        return torch.stack(values).to(self.num_targets.device)

    def _check(self, side: str, centres: Tensor, classes: Tensor, others: Sequence[Tensor]) -> None:
        if centres.ndim != 2 or centres.shape[1] < 2:
            raise ValueError(f"Centres of the {side} must be (N, 2 or more), got {tuple(centres.shape)}.")
        shapes = [tuple(tensor.shape) for tensor in (classes, *others)]
        if any(shape != (len(centres),) for shape in shapes):
            raise ValueError(
                f"The {side} have {len(centres)} centres, so every other tensor of the {side} "
                f"must have shape ({len(centres)},), got {shapes}."
            )
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(
                f"Classes of the {side} must lie in [0, {self.num_classes}), "
                f"got {int(classes.min())} to {int(classes.max())}."
            )


def greedy_match(distance: Tensor, scores: Tensor, limits: Sequence[float]) -> Tensor:
    """Let predictions take their closest free ground truth by descending score.

    Args:
        distance: (P, M), infinite where a pair may not match.
        scores: (P,).
        limits: T distances; a match is strictly nearer.

    Returns:
        (P, T), 1 where the prediction is a true positive at that limit. It is uint8 because not
        every communication backend gathers booleans.
    """
    matched = torch.zeros(len(scores), len(limits), dtype=torch.uint8, device=distance.device)
    if distance.numel() == 0:
        return matched
    limit = distance.new_tensor(limits)
    free = torch.ones(len(limits), distance.shape[1], dtype=torch.bool, device=distance.device)
    rows = torch.arange(len(limits), device=distance.device)
    order = _by_score(scores)
    # Predictions far from everything match nothing whatever is free: skipping them is exact.
    for index in order[distance[order].amin(dim=1) < limit.max()].tolist():
        nearest, taken = distance[index].where(free, torch.inf).min(dim=1)  # (T,), (T,)
        hit = nearest < limit
        matched[index] = hit
        free[rows, taken] &= ~hit
    return matched


def average_precision(matched: Tensor, num_targets: int) -> Tensor:
    """Average precision of one class at one distance.

    Args:
        matched: (P,), true positives by descending score.
        num_targets: Number of ground truths, at least 1.

    Returns:
        A float32 scalar in [0, 1].
    """
    if not matched.any():
        return torch.tensor(0.0)
    tp = matched.double().cumsum(0)
    precision = tp / torch.arange(1, len(tp) + 1)
    points = torch.arange(RECALL_POINTS, dtype=torch.float64) * (1 / (RECALL_POINTS - 1))
    sampled = _interpolate(points, tp / num_targets, precision)[FIRST_POINT:]
    return ((sampled - MIN_PRECISION).clamp(min=0).mean() / (1 - MIN_PRECISION)).float()


def _by_score(scores: Tensor) -> Tensor:
    """Indices by descending score; among equals the larger index first, as on nuScenes."""
    return len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)


def _interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """Piecewise linear fp(xp) at x: fp[0] on the left of xp, 0 on its right.

    Where xp repeats a value, its last fp counts.
    """
    left = (torch.searchsorted(xp, x, right=True) - 1).clamp(min=0)
    right = (left + 1).clamp(max=len(xp) - 1)
    width = xp[right] - xp[left]
    share = ((x - xp[left]) / width.where(width > 0, 1)).clamp(min=0)
    value = fp[left] + share * (fp[right] - fp[left])
    return value.where(x <= xp[-1], 0)
