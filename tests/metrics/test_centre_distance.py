import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from altermoma_pl.metrics import CentreDistanceAP

LIMITS = (0.5, 1.0, 2.0, 4.0)


def detections(*rows):
    """Rows of (x, y, score, class, frame) as the first four arguments of `update`."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return table[:, :2], table[:, 2], table[:, 3].long(), table[:, 4].long()


def truths(*rows):
    """Rows of (x, y, class, frame) as the last three arguments of `update`."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return table[:, :2], table[:, 2].long(), table[:, 3].long()


def reference_ap(predictions, targets, limit):
    """AP of one class: the textbook loop, with numpy's interpolation."""
    ranked = sorted(enumerate(predictions), key=lambda item: (item[1][2], item[0]), reverse=True)
    taken, hits = set(), []
    for _, (x, y, _, _, frame) in ranked:
        best, nearest = None, np.inf
        for j, (tx, ty, _, target_frame) in enumerate(targets):
            distance = np.hypot(x - tx, y - ty)
            if target_frame == frame and j not in taken and distance < nearest:
                best, nearest = j, distance
        hits.append(nearest < limit)
        if hits[-1]:
            taken.add(best)
    if not any(hits):
        return 0.0
    tp, fp = np.cumsum(hits), np.cumsum(np.logical_not(hits))
    precision = np.interp(np.linspace(0, 1, 101), tp / len(targets), tp / (tp + fp), right=0)
    return np.clip(precision[11:] - 0.1, 0, None).mean() / 0.9


def reference(predictions, targets):
    values = []
    for c in sorted({int(row[2]) for row in targets}):
        of_class = [row for row in predictions if row[3] == c]
        goals = [row for row in targets if row[2] == c]
        values.append(np.mean([reference_ap(of_class, goals, limit) for limit in LIMITS]))
    return float(np.mean(values))


def scene(seed, frames=3):
    """Coarse positions and scores, so that ties and distances of exactly a limit occur."""
    rng = np.random.default_rng(seed)
    targets = [
        (*rng.integers(0, 12, 2) / 2, rng.integers(3), frame)
        for frame in range(frames)
        for _ in range(rng.integers(0, 5))
    ]
    predictions = [
        (*rng.integers(0, 12, 2) / 2, rng.integers(1, 8) / 8, rng.integers(3), frame)
        for frame in range(frames)
        for _ in range(rng.integers(0, 9))
    ]
    return [*predictions, (9.0, 9.0, 0.5, 0, 0)], [*targets, (9.5, 9.0, 0, 0)]


def test_perfect_detections_give_one():
    metric = CentreDistanceAP(2)
    metric.update(
        *detections((1, 2, 0.9, 0, 0), (8, 2, 0.3, 1, 0), (1, 2, 0.4, 0, 1)),
        *truths((1, 2, 0, 0), (8, 2, 1, 0), (1, 2, 0, 1)),
    )
    assert_close(metric.compute(), torch.tensor(1.0))


def test_distance_must_be_strictly_smaller():
    metric = CentreDistanceAP(1)
    metric.update(*detections((1, 0, 0.9, 0, 0)), *truths((0, 0, 0, 0)))
    assert_close(metric.compute(), torch.tensor(0.5))  # 1 m away: a match at 2 and 4 m only


def test_half_recall_by_hand():
    metric = CentreDistanceAP(1, distances=[2.0])
    metric.update(*detections((0, 0, 0.9, 0, 0)), *truths((0, 0, 0, 0), (9, 0, 0, 0)))
    # Precision 1 at the recall points .11 .. .50, that is 40 of 90, and 0 beyond.
    assert_close(metric.compute(), torch.tensor(40 / 90))


def test_false_positive_before_the_hit_by_hand():
    metric = CentreDistanceAP(1, distances=[2.0])
    metric.update(
        *detections((9, 9, 0.9, 0, 0), (0, 0, 0.8, 0, 0)),
        *truths((0, 0, 0, 0)),
    )
    # Precision rises from 0 at recall 0 to 1/2 at recall 1: at recall r it is r / 2.
    expected = sum(max(r / 200 - 0.1, 0) for r in range(11, 101)) / 90 / 0.9
    assert_close(metric.compute(), torch.tensor(expected))


def test_duplicate_takes_no_second_match():
    metric = CentreDistanceAP(1, distances=[2.0])
    metric.update(
        *detections((0, 0, 0.9, 0, 0), (0, 0, 0.8, 0, 0)),
        *truths((0, 0, 0, 0), (50, 0, 0, 0)),
    )
    # Recall .5 is reached with precision 1 and kept with 1/2; the last value at .5 counts.
    assert_close(metric.compute(), torch.tensor((39 * 0.9 + 0.4) / 90 / 0.9))


def test_other_frame_and_other_class_do_not_match():
    metric = CentreDistanceAP(2)
    metric.update(*detections((0, 0, 0.9, 0, 1), (5, 5, 0.9, 1, 0)), *truths((0, 0, 0, 0), (5, 5, 0, 0)))
    assert metric.compute() == 0


def test_classes_without_ground_truth_are_left_out():
    metric = CentreDistanceAP(3)
    metric.update(*detections((0, 0, 0.9, 0, 0), (5, 5, 0.9, 1, 0)), *truths((0, 0, 0, 0), (7, 7, 2, 0)))
    expected = torch.tensor([1.0, torch.nan, 0.0])
    assert_close(metric.per_class(), expected, equal_nan=True)
    assert_close(metric.compute(), torch.tensor(0.5))


@pytest.mark.parametrize("predictions", [[], [(0, 0, 0.5, 0, 0)]])
@pytest.mark.parametrize("targets", [[], [(9, 9, 0, 0)]])
def test_empty_sides_give_zero(predictions, targets):
    metric = CentreDistanceAP(1)
    metric.update(*detections(*predictions), *truths(*targets))
    assert metric.compute() == 0


def test_targets_reduced_from_a_process_without_predictions():
    metric = CentreDistanceAP(2)
    metric.num_targets += torch.tensor([1, 0])
    assert_close(metric._ap(), torch.tensor([0.0, torch.nan]), equal_nan=True)


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_reference(seed):
    predictions, targets = scene(seed)
    metric = CentreDistanceAP(3)
    metric.update(*detections(*predictions), *truths(*targets))
    assert_close(metric.compute().item(), reference(predictions, targets), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_frame_by_frame_equals_all_at_once(seed):
    predictions, targets = scene(seed)
    at_once, by_frame = CentreDistanceAP(3), CentreDistanceAP(3)
    in_order = sorted(predictions, key=lambda row: row[4])
    at_once.update(*detections(*in_order), *truths(*targets))
    for frame in range(3):
        by_frame.update(
            *detections(*(row for row in predictions if row[4] == frame)),
            *truths(*(row for row in targets if row[3] == frame)),
        )
    assert_close(by_frame.compute(), at_once.compute())


def test_order_of_predictions_does_not_matter():
    rng = np.random.default_rng(0)
    predictions, targets = scene(1)
    distinct = [(x, y, i / 100, c, f) for i, (x, y, _, c, f) in enumerate(predictions)]
    values = []
    for _ in range(3):
        metric = CentreDistanceAP(3)
        metric.update(*detections(*distinct), *truths(*targets))
        values.append(metric.compute())
        rng.shuffle(distinct)
        rng.shuffle(targets)
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0."),
        (
            {"num_classes": 1, "distances": []},
            "distances must be one or more positive numbers, got [].",
        ),
        (
            {"num_classes": 1, "distances": [1.0, 0.0]},
            "distances must be one or more positive numbers, got [1.0, 0.0].",
        ),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CentreDistanceAP(**arguments)


def test_refused_updates():
    metric = CentreDistanceAP(1)
    one, truth = detections((0, 0, 0.5, 0, 0)), truths((0, 0, 0, 0))
    with pytest.raises(ValueError, match=re.escape("predictions must be (N, 2 or more), got (2,)")):
        metric.update(one[0][0], *one[1:], *truth)
    with pytest.raises(ValueError, match=re.escape("must have shape (1,), got [(1,), (2,), (1,)]")):
        metric.update(one[0], torch.rand(2), *one[2:], *truth)
    with pytest.raises(ValueError, match=re.escape("of the targets must lie in [0, 1), got 1 to")):
        metric.update(*one, truth[0], truth[1] + 1, truth[2])
