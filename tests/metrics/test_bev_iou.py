import re

import pytest
import torch
from torch.testing import assert_close

from altermoma_pl.metrics import BEVIoU


def maps(*rows):
    """One frame, one class per row, maps of 1 x len(row) cells."""
    return torch.tensor(rows)[None, :, None, :]


def reference(probabilities, target, thresholds):
    """IoU per class at its best threshold, cell by cell in Python; None for absent classes."""
    values = []
    for c in range(probabilities.shape[1]):
        cells = list(zip(probabilities[:, c].flatten(), target[:, c].flatten(), strict=True))
        best = None
        for threshold in thresholds:
            union = [bool(p >= threshold) or bool(t) for p, t in cells]
            both = [bool(p >= threshold) and bool(t) for p, t in cells]
            if sum(union):
                best = max(best or 0.0, sum(both) / sum(union))
        values.append(best)
    return values


def test_best_threshold_per_class_by_hand():
    metric = BEVIoU(2)
    # Class 0: .35 and .4 predict 3 cells, 2 of them right (2/3); .45 and above 2, both right (1).
    # Class 1: .35 to .5 predict 1 of 2 present cells and nothing else (1/2); above, nothing.
    metric.update(
        maps([0.9, 0.7, 0.42, 0.1], [0.52, 0.1, 0.1, 0.1]),
        maps([1, 1, 0, 0], [1, 1, 0, 0]),
    )
    assert_close(metric.per_class(), torch.tensor([1.0, 0.5]))
    assert_close(metric.compute(), torch.tensor(0.75))


def test_threshold_is_inclusive():
    metric = BEVIoU(1, thresholds=[0.5])
    metric.update(maps([0.5]), maps([1]))
    assert metric.compute() == 1


def test_thresholds_are_not_rounded_to_half_precision():
    metric = BEVIoU(1, thresholds=[0.35])
    metric.update(maps([0.35]).bfloat16(), maps([1]))  # 0.3496 in bfloat16
    assert metric.compute() == 0


def test_official_thresholds():
    assert_close(BEVIoU(6).thresholds, torch.arange(0.35, 0.66, 0.05))


def test_perfect_maps_give_one():
    target = torch.rand(3, 4, 8, 8) < 0.3
    metric = BEVIoU(4)
    metric.update(target.float(), target.to(torch.uint8))
    assert metric.compute() == 1


def test_pixels_are_summed_over_updates_not_averaged():
    metric = BEVIoU(1)
    metric.update(maps([1.0, 1.0, 1.0]), maps([1, 1, 1]))
    metric.update(maps([1.0]), maps([0]))
    assert_close(metric.compute(), torch.tensor(3 / 4))


def test_absent_class_is_left_out_and_false_alarm_counts():
    metric = BEVIoU(3)
    metric.update(
        maps([1.0, 0.0], [0.0, 0.3], [0.4, 0.0]),  # class 1 stays below every threshold
        maps([1, 0], [0, 0], [0, 0]),
    )
    assert_close(metric.per_class(), torch.tensor([1.0, torch.nan, 0.0]), equal_nan=True)
    assert_close(metric.compute(), torch.tensor(0.5))


def test_without_any_class_the_mean_is_zero():
    metric = BEVIoU(2)
    metric.update(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    assert metric.compute() == 0


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(2, 3, 4, 5, generator=generator)
    target = torch.rand(2, 3, 4, 5, generator=generator) < 0.4
    metric = BEVIoU(3)
    for frame in range(2):
        metric.update(probabilities[frame : frame + 1], target[frame : frame + 1])
    expected = reference(probabilities, target, metric.thresholds)
    assert_close(metric.per_class(), torch.tensor(expected))
    assert_close(metric.compute(), torch.tensor(expected).mean())


def test_reset_forgets():
    metric = BEVIoU(1)
    metric.update(maps([1.0]), maps([0]))
    metric.reset()
    metric.update(maps([1.0]), maps([1]))
    assert metric.compute() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0."),
        (
            {"num_classes": 1, "thresholds": []},
            "thresholds must be one or more numbers in (0, 1], got [].",
        ),
        (
            {"num_classes": 1, "thresholds": [0.0]},
            "thresholds must be one or more numbers in (0, 1], got [0.0].",
        ),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BEVIoU(**arguments)


def test_refused_shapes():
    metric = BEVIoU(2)
    with pytest.raises(ValueError, match=re.escape("must be (B, 2, nx, ny), got (1, 3, 4, 4).")):
        metric.update(torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=re.escape("got (1, 2, 4, 4) and (1, 2, 4, 5).")):
        metric.update(torch.rand(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))
