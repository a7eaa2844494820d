import math
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from altermoma_pl.metrics import CentreDistanceAP, DetectionClass, NuScenesDetection
from tests.helpers.nuscenes_scenes import UNKNOWN, arguments, detection, evaluate, scene, truth

CAR = DetectionClass("car", 50.0)
CONE, BARRIER = 8, 9
ERRORS = ("ate", "ase", "aoe", "ave", "aae")


def computed(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_perfect_detections_score_one():
    found = [detection(c + 1, 2, c=c) for c in range(10)]
    metric = evaluate(found, [truth(c + 1, 2, c=c) for c in range(10)])
    assert computed(metric) == pytest.approx({"nds": 1, "map": 1} | dict.fromkeys(ERRORS, 0))


def test_one_match_by_hand():
    # .5 m away: no match at .5, a match at 1, 2 and 4. IoU of sizes 1/2. The attribute is wrong.
    found = [detection(10.3, 2.4, size=(8, 2, 1.5), yaw=0.3, velocity=(3, 4.4), attribute=1)]
    metric = evaluate(found, [truth(10, 2, velocity=(3, 4))], CAR)
    errors = {"ate": 0.5, "ase": 0.5, "aoe": 0.3, "ave": 0.4, "aae": 1}
    score = (5 * 0.75 + 0.5 + 0.5 + 0.7 + 0.6 + 0) / 10
    assert computed(metric) == pytest.approx({"nds": score, "map": 0.75} | errors, abs=1e-6)


def test_running_mean_over_recall_by_hand():
    found = [detection(0, 0, score=0.9), detection(11, 0, score=0.5)]
    metric = evaluate(found, [truth(0, 0), truth(10, 0)], CAR)
    # Recall 1/2 is reached at score .9 without error, recall 1 at .5 with mean 1/2, linear between:
    # (r - 50) / 100 at recalls of r = 51 .. 100 %, of 90 recalls in all.
    assert computed(metric)["ate"] == pytest.approx(sum(k / 100 for k in range(1, 51)) / 90)


@pytest.mark.parametrize(("num_targets", "expected"), [(10, 1.0), (9, 0.25)])
def test_errors_are_one_up_to_ten_percent_recall(num_targets, expected):
    goals = [truth(4 * i, 0) for i in range(num_targets)]
    assert computed(evaluate([detection(0.25, 0)], goals, CAR))["ate"] == expected


def test_errors_above_one_are_clipped_in_the_score_only():
    values = computed(evaluate([detection(0, 0, yaw=3, velocity=(9, 0))], [truth(0, 0)], CAR))
    assert (values["aoe"], values["ave"]) == pytest.approx((3, 9))
    assert values["nds"] == pytest.approx((5 + 1 + 1 + 0 + 0 + 1) / 10)


@pytest.mark.parametrize(("c", "max_range"), [(0, 50), (5, 40), (CONE, 30), (BARRIER, 30)])
def test_boxes_count_strictly_within_the_range_of_their_class(c, max_range):
    inside = max_range - 0.25
    metric = evaluate(
        [detection(inside, 0, 0.5, c), detection(max_range, 0, 0.9, c), detection(0, -max_range, 0.9, c)],
        [truth(inside, 0, c), truth(0, max_range, c)],
    )
    assert metric.num_targets[c] == 1
    assert metric.per_class()["ap"][c] == 1


def test_targets_without_points_do_not_count():
    metric = evaluate([detection(0, 0)], [truth(0, 0, points=0), truth(9, 0, points=1)], CAR)
    assert metric.num_targets.tolist() == [1]
    assert computed(metric)["map"] == 0


def test_unknown_points_remove_nothing():
    metric = NuScenesDetection([CAR])
    metric.update(**arguments([detection(0, 0)], [truth(0, 0, points=0)]) | {"target_points": None})
    assert computed(metric)["map"] == 1


def test_of_equal_scores_the_later_matches_first():
    metric = evaluate([detection(0, 0), detection(0.25, 0)], [truth(0, 0)], CAR)
    assert computed(metric)["ate"] == 0.25


def test_barriers_look_the_same_from_behind_and_cones_from_everywhere():
    found = [detection(c, 0, c=c, yaw=math.pi + 0.25) for c in (0, CONE, BARRIER)]
    errors = evaluate(found, [truth(c, 0, c=c) for c in (0, CONE, BARRIER)]).per_class()
    expected = torch.tensor([math.pi - 0.25, torch.nan, 0.25])
    assert_close(errors["aoe"][[0, CONE, BARRIER]], expected, equal_nan=True)


def test_cones_and_barriers_have_no_velocity_and_attribute():
    table = evaluate([], []).per_class()
    for name in ("ave", "aae"):
        assert table[name].isnan().nonzero().flatten().tolist() == [CONE, BARRIER]
        assert table[name].nansum() == 8


def test_classes_without_ground_truth_count_as_in_the_official_evaluation():
    found = [detection(0, 0), detection(5, 5, c=1)]
    metric = evaluate(found, [truth(0, 0)], CAR, DetectionClass("bus"))
    assert_close(metric.per_class()["ap"], torch.tensor([1.0, 0.0]))
    assert computed(metric) == pytest.approx({"nds": 0.5, "map": 0.5} | dict.fromkeys(ERRORS, 0.5))


def test_unknown_velocity_and_attribute_are_left_out_of_the_mean():
    goals = [truth(0, 0, velocity=UNKNOWN, attribute=-1), truth(9, 0)]
    found = [detection(0, 0, velocity=(5, 5)), detection(9, 0, velocity=(0.5, 0), attribute=1)]
    values = computed(evaluate(found, goals, CAR))  # equal scores: the second is the first of the mean
    assert (values["ave"], values["aae"]) == pytest.approx((0.5, 1))


def test_errors_are_one_if_no_match_knows_them():
    values = computed(evaluate([detection(0, 0)], [truth(0, 0, velocity=UNKNOWN, attribute=-1)], CAR))
    assert (values["ave"], values["aae"]) == (1, 1)


@pytest.mark.parametrize("velocity", [True, False])
@pytest.mark.parametrize("attributes", [True, False])
def test_only_all_five_errors_make_nds(velocity, attributes):
    found, goals = [detection(0.75, 0, yaw=0.2)], [truth(0, 0)]
    values = computed(evaluate(found, goals, CAR, velocity=velocity, attributes=attributes))
    errors = [name for name in ERRORS if {"ave": velocity, "aae": attributes}.get(name, True)]
    score = "nds" if velocity and attributes else "nds_3"
    assert list(values) == [score, "map", *errors]
    expected = {"nds": (5 * 0.75 + 0.25 + 1 + 0.8 + 2) / 10, "nds_3": (3 * 0.75 + 0.25 + 1 + 0.8) / 6}
    assert values[score] == pytest.approx(expected[score])


def test_boxes_without_velocity():
    boxes = {"boxes": torch.ones(1, 7), "target_boxes": torch.ones(1, 7)}
    metric = NuScenesDetection([CAR], velocity=False, attributes=False)
    metric.update(**arguments([detection(0, 0)], [truth(0, 0)], attributes=False) | boxes)
    assert computed(metric)["nds_3"] == 1


def test_a_score_of_an_error_that_never_applies_is_nan():
    values = computed(evaluate([], [truth(0, 0)], DetectionClass("cone", yaw_period=None), velocity=False))
    assert math.isnan(values["aoe"])
    assert math.isnan(values["nds_3"])


def test_nothing_at_all():
    assert computed(evaluate([], [])) == {"nds": 0, "map": 0} | dict.fromkeys(ERRORS, 1)


def test_precision_is_that_of_centre_distance():
    found, goals = scene(3)
    ours = evaluate(found, goals, *(DetectionClass(str(c)) for c in range(10)))
    other = CentreDistanceAP(10)
    values = arguments(found, goals)
    counts = values["target_points"] > 0
    other.update(
        *list(values.values())[:4], *(values[f"target_{n}"][counts] for n in ("boxes", "classes", "frames"))
    )
    assert_close(ours.per_class()["ap"], other.per_class())


def distinct(seed):
    """A scene in which no two scores are equal: the order of the frames cannot matter."""
    found, goals = scene(seed, frames=3)
    return [row | {"score": (row["score"] * 32 + i / 1024) / 64} for i, row in enumerate(found)], goals


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(3)))
def test_neither_order_nor_split_of_the_frames_matters(seed, order):
    found, goals = distinct(seed)
    parts = [NuScenesDetection(), NuScenesDetection()]
    for place, frame in enumerate(order):
        rows = ([row for row in side if row["frame"] == frame] for side in (found, goals))
        parts[place % 2].update(**arguments(*rows))
    parts[0].merge_state(parts[1])
    assert_close(parts[0].compute(), evaluate(found, goals).compute())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.integers(0, 9), frame=st.integers(0, 2))
def test_a_false_positive_of_lowest_score_never_helps(seed, c, frame):
    found, goals = distinct(seed)
    goals = [row for row in goals if math.hypot(*row["box"][:2]) > 5]  # so that the origin is far away
    before = evaluate(found, goals).per_class()["ap"]
    after = evaluate([*found, detection(0, 0, 1e-4, c, frame)], goals).per_class()["ap"]
    assert (after <= before).all()
    assert_close(after[torch.arange(10) != c], before[torch.arange(10) != c])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_values_lie_in_their_ranges(seed):
    table = evaluate(*scene(seed, frames=2)).per_class()
    for name, upper in {"ap": 1, "ate": 2, "ase": 1, "aoe": math.pi, "aae": 1}.items():
        known = table[name][~table[name].isnan()]
        assert ((known >= 0) & (known <= upper + 1e-6)).all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes must be one or more with different names, got []."),
        ({"classes": [CAR, CAR]}, "different names, got ['car', 'car']."),
        ({"distances": []}, "distances must be one or more positive numbers, got []."),
        ({"distances": [0.0, 2.0]}, "distances must be one or more positive numbers, got [0.0, 2.0]."),
        ({"error_distance": 3.0}, "must be one of the distances (0.5, 1.0, 2.0, 4.0), got 3.0."),
        ({"max_predictions": 0}, "max_predictions must be at least 1, got 0."),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        NuScenesDetection(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_range": 0}, "max_range of 'car' must be positive, got 0."),
        ({"max_range": math.nan}, "max_range of 'car' must be positive, got nan."),
        ({"yaw_period": 7.0}, "yaw_period of 'car' must lie in (0, 2 pi] or be None, got 7.0."),
    ],
)
def test_refused_classes(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectionClass("car", **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": torch.ones(1, 8)}, "Boxes of the predictions must be (N, 9 or more), got (1, 8)."),
        ({"target_points": torch.ones(2)}, "The targets have 1 boxes, so every other tensor of the targets"),
        ({"classes": torch.tensor([1])}, "Classes of the predictions must lie in [0, 1), got 1 to 1."),
        ({"boxes": torch.zeros(1, 9)}, "Boxes of the predictions must be finite with positive sizes"),
        ({"target_boxes": torch.full((1, 9), torch.nan)}, "Boxes of the targets must be finite"),
        ({"attributes": None}, "made with attributes=True, so attributes and target_attributes must both be"),
    ],
)
def test_refused_updates(changed, message):
    metric = NuScenesDetection([CAR])
    with pytest.raises(ValueError, match=re.escape(message)):
        metric.update(**arguments([detection(0, 0)], [truth(0, 0)]) | changed)


def test_attributes_are_refused_where_they_would_be_ignored():
    metric = NuScenesDetection([CAR], attributes=False)
    with pytest.raises(ValueError, match="attributes=False, so attributes and target_attributes must not be"):
        metric.update(**arguments([detection(0, 0)], [truth(0, 0)]))


def test_too_many_predictions_of_one_frame():
    rows = [detection(0, 0, frame=frame) for frame in (7, 5, 7)]
    assert len(evaluate(rows, [], CAR, max_predictions=2).rows) == 1
    with pytest.raises(ValueError, match="at most 2 predictions, but frame 7 has more: keep those"):
        evaluate([*rows, detection(99, 0, frame=7)], [], CAR, max_predictions=2)
