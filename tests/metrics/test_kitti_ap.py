"""KITTI's AP: known answers, the rules one by one, a reference in plain loops, processes."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchmetrics.utilities import dim_zero_cat

from altermoma_pl.metrics import KittiAP, kitti_types
from altermoma_pl.metrics.kitti_rules import overlaps, threshold_ranks
from tests.helpers.kitti_scenes import Thing, detections, random_scene, reference, targets

ONE_FOUND = 1 / 11  # R11 with a precision of 1 at the first threshold only


def evaluate(found, truths, **options):
    metric = KittiAP(**options)
    metric.update(detections(*found), targets(*truths))
    return {key: value.item() for key, value in metric.compute().items()}


def many(count, **changes):
    """One object per frame, with distinct scores."""
    return [Thing(frame=i, score=(i + 1) / (count + 1), **changes) for i in range(count)]


# Known answers.


@pytest.mark.parametrize(
    ("num", "num_found", "r11", "r40"),
    [
        (1, 1, 9.09, 0),
        (5, 5, 18.2, 10),
        (10, 10, 27.3, 22.5),
        (20, 20, 45.5, 47.5),
        (25, 25, 63.6, 60),
        (40, 40, 90.9, 97.5),
        (41, 41, 100, 100),
        (57, 57, 100, 100),
        (200, 200, 100, 100),
        (200, 100, 54.55, 50),
    ],
)
def test_perfect_detector_by_number_of_objects(num, num_found, r11, r40):
    things = many(num)
    values = evaluate(things[-num_found:], things, measures=["2d", "3d_loose"])
    for measure in ("2d", "3d_loose"):
        for difficulty in ("easy", "moderate", "hard"):
            assert 100 * values[f"car_{measure}_r11_{difficulty}"] == pytest.approx(r11, abs=0.05)
            assert 100 * values[f"car_{measure}_r40_{difficulty}"] == pytest.approx(r40, abs=0.05)


def test_precision_by_hand():
    # A false positive above the two true ones: precision 1/2, then 2/3. Both thresholds stay, at
    # the first two of 41 places; the running maximum lifts the first to 2/3.
    truths = [Thing(), Thing(x=10)]
    found = [Thing(x=20, score=0.9), Thing(score=0.8), Thing(x=10, score=0.7)]
    values = evaluate(found, truths)
    assert values["car_3d_r11_easy"] == pytest.approx(2 / 3 / 11)
    assert values["car_3d_r40_easy"] == pytest.approx(2 / 3 / 40)
    # Last, it counts at no threshold.
    found[0] = Thing(x=20, score=0.1)
    assert evaluate(found, truths)["car_3d_r40_easy"] == pytest.approx(1 / 40)


def test_keys_and_values():
    metric = KittiAP(measures=["bev", "3d_loose"])
    metric.update(detections(), targets())
    values = metric.compute()
    assert len(values) == 3 * 2 * 2 * 3
    assert "pedestrian_3d_loose_r11_hard" in values
    assert all(value.shape == () and value == 0 for value in values.values())
    metric.update(
        detections(), targets(Thing(), Thing(x=10, occlusion=1), Thing(kind="Cyclist", occlusion=2))
    )
    valid = {key: count for key, count in metric.num_valid().items() if count}
    assert valid == {"car_easy": 1, "car_moderate": 2, "car_hard": 2, "cyclist_hard": 1}


def test_thresholds_by_hand():
    assert threshold_ranks(0, 5) == []
    assert threshold_ranks(3, 3) == [0, 1, 2]
    # Recall grows by 1 / 80: after the first, every second score is closest to a step of 1 / 40.
    assert threshold_ranks(5, 80) == [0, 1, 3, 4]
    assert len(threshold_ranks(10_000, 10_000)) == 41


# Overlap.


def test_overlap_must_be_larger():
    # In the image, 80 of 80 by 40 of 80 pixels: exactly 1/2, which is the limit of pedestrians.
    truth = Thing(kind="Pedestrian", pixels=80)
    half, more = replace(truth, pixels=40), replace(truth, pixels=41)
    assert evaluate([half], [truth])["pedestrian_2d_r11_easy"] == 0
    assert evaluate([more], [truth])["pedestrian_2d_r11_easy"] == pytest.approx(ONE_FOUND)


@pytest.mark.parametrize(
    ("kind", "shift", "strict", "loose"),
    [  # shifted by s, boxes of 4 m overlap by (4 - s) / (4 + s)
        ("Car", 0.7, ONE_FOUND, ONE_FOUND),  # .702
        ("Car", 0.8, 0, ONE_FOUND),  # .667
        ("Car", 1.4, 0, 0),  # .481
        ("Pedestrian", 1.3, ONE_FOUND, ONE_FOUND),  # .509
        ("Cyclist", 1.4, 0, ONE_FOUND),
        ("Cyclist", 2.3, 0, ONE_FOUND),  # .270
        ("Pedestrian", 2.5, 0, 0),  # .231
    ],
)
def test_strict_and_loose_overlap(kind, shift, strict, loose):
    values = evaluate([Thing(x=shift, kind=kind)], [Thing(kind=kind)])
    for measure in ("bev", "3d"):
        assert values[f"{kind.lower()}_{measure}_r11_easy"] == pytest.approx(strict)
        assert values[f"{kind.lower()}_{measure}_loose_r11_easy"] == pytest.approx(loose)


def test_height_counts_in_3d_only():
    found, truth = detections(Thing()), targets(Thing())
    found.boxes[:, 4] -= 0.5  # 1 of 2 metres in common
    overlap = overlaps(["2d", "bev", "3d", "3d_loose"], truth, found).squeeze().tolist()
    assert overlap == pytest.approx([1, 1, 0.5, 0.5])
    found.boxes[:, 0] = 1.0  # from .5 to 1.5 m above the ground: 1 metre in common of 1.5
    assert overlaps(["3d"], truth, found).item() == pytest.approx(1 / 1.5)


def test_camera_boxes_equal_the_benchmarks_corners():
    rng = np.random.default_rng(0)
    low, high = [1, 1, 1, -2, 0, 8, -4], [2, 3, 5, 2, 2, 12, 4]
    boxes = rng.uniform(low, high, (40, 7))
    signs = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    rotation = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    corners = signs * boxes[:, None, [2, 1]] @ rotation.transpose(0, 2, 1) + boxes[:, None, [3, 5]]
    shapes = shapely.polygons(corners)
    ground = shapely.area(shapely.intersection(shapes[:, None], shapes))
    bottom, top = boxes[:, 4], boxes[:, 4] - boxes[:, 0]
    common = ground * (np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)).clip(min=0)
    area, volume = shapely.area(shapes), boxes[:, :3].prod(axis=1)
    things = detections(*[Thing()] * 40)._replace(boxes=torch.tensor(boxes))
    truths = targets(*[Thing()] * 40)._replace(boxes=torch.tensor(boxes))
    bev, box = overlaps(["bev", "3d"], truths, things).numpy()
    np.testing.assert_allclose(bev, ground / (area[:, None] + area - ground), atol=1e-9)
    np.testing.assert_allclose(box, common / (volume[:, None] + volume - common), atol=1e-9)


# Filters and flags.


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, (1, 1, 1)),
        ({"pixels": 40}, (0, 1, 1)),  # height must be larger
        ({"pixels": 41}, (1, 1, 1)),
        ({"pixels": 25}, (0, 0, 0)),
        ({"truncation": 0.15}, (1, 1, 1)),
        ({"truncation": 0.16}, (0, 1, 1)),
        ({"truncation": 0.3}, (0, 1, 1)),
        ({"truncation": 0.5}, (0, 0, 1)),
        ({"truncation": 0.51}, (0, 0, 0)),
        ({"occlusion": 1}, (0, 1, 1)),
        ({"occlusion": 2}, (0, 0, 1)),
        ({"occlusion": 3}, (0, 0, 0)),
        ({"kind": "Van"}, (0, 0, 0)),
        ({"kind": "DontCare"}, (0, 0, 0)),
    ],
)
def test_filters_of_the_ground_truth(changes, valid):
    metric = KittiAP()
    metric.update(detections(), targets(Thing(**changes)))
    assert metric.num_targets[0].tolist() == list(valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_at_the_limit_passes_in_any_precision(dtype):
    metric = KittiAP()
    truth = targets(Thing())
    metric.update(detections(), truth._replace(truncation=torch.tensor([0.15], dtype=dtype)))
    assert metric.num_valid()["car_easy"] == 1


def test_heights_can_be_scaled():
    metric = KittiAP(height_scale=0.25)
    small = Thing(pixels=9)  # at full width 36 pixels
    metric.update(detections(small), targets(small))
    assert metric.num_targets[0].tolist() == [0, 1, 1]
    values = metric.compute()
    assert_close(values["car_3d_r11_moderate"], torch.tensor(ONE_FOUND))
    assert values["car_3d_r11_easy"] == 0


PAIR = (Thing(), Thing(x=10))  # two objects: R11 is 1/11 times the best precision


def precision(found, truths, kind="car", measure="3d", difficulty="easy"):
    return 11 * evaluate(found, truths)[f"{kind}_{measure}_r11_{difficulty}"]


def test_small_detection_is_no_false_positive():
    lone = Thing(x=20, score=0.9)
    assert precision([*PAIR, lone], PAIR) == pytest.approx(2 / 3)
    assert precision([*PAIR, replace(lone, pixels=40)], PAIR) == pytest.approx(2 / 3)
    small = [*PAIR, replace(lone, pixels=39)]
    assert precision(small, PAIR) == pytest.approx(1)
    assert precision(small, PAIR, difficulty="moderate") == pytest.approx(2 / 3)


def test_small_detection_of_another_class_absorbs_an_object_in_the_first_pass():
    # Above the car's own detection, so that its score is no threshold: one threshold is left, at
    # which the car takes its own again.
    absorber = Thing(kind="Pedestrian", pixels=20, score=0.9)
    found = [absorber, *PAIR]
    values = evaluate(found, PAIR)
    assert values["car_3d_r40_easy"] == 0
    assert values["car_3d_r11_easy"] == pytest.approx(ONE_FOUND)
    assert evaluate(PAIR, PAIR)["car_3d_r40_easy"] == pytest.approx(1 / 40)
    large = replace(absorber, pixels=60)
    assert evaluate([large, *PAIR], PAIR)["car_3d_r40_easy"] == pytest.approx(1 / 40)


@pytest.mark.parametrize(
    ("kind", "neighbour", "expected"),
    [
        ("Car", "Van", 1),
        ("Car", "Truck", 2 / 3),
        ("Pedestrian", "Person_sitting", 1),
        ("Pedestrian", "Cyclist", 2 / 3),
        ("Cyclist", "Person_sitting", 2 / 3),
    ],
)
def test_detection_on_a_neighbouring_class(kind, neighbour, expected):
    truths = [replace(thing, kind=kind) for thing in PAIR]
    found = [*truths, Thing(x=20, kind=kind, score=0.9)]
    other = Thing(x=20, kind=neighbour)
    assert precision(found, [*truths, other], kind.lower()) == pytest.approx(expected)


def test_detection_on_an_object_that_is_too_hard():
    hidden, found = Thing(x=20, occlusion=1), [*PAIR, Thing(x=20, score=0.9)]
    assert precision(found, [*PAIR, hidden]) == pytest.approx(1)
    assert precision(found, PAIR) == pytest.approx(2 / 3)


def test_dont_care_excuses_in_the_image_only():
    found = [*PAIR, Thing(x=21, score=0.9)]
    region = Thing(x=20, kind="DontCare")  # 60 of 80 columns in common
    assert precision(found, [*PAIR, region], measure="2d") == pytest.approx(1)
    assert precision(found, [*PAIR, region], measure="bev") == pytest.approx(2 / 3)
    assert precision(found, [*PAIR, region], measure="3d") == pytest.approx(2 / 3)
    farther = replace(region, x=19)  # 40 of 80
    assert precision(found, [*PAIR, farther], measure="2d") == pytest.approx(2 / 3)
    both = [*PAIR, region, replace(region, x=22)]
    assert precision(found, both, measure="2d") == pytest.approx(1)


def test_duplicate_is_a_false_positive():
    # At the first threshold, .9, the duplicate itself is the true positive.
    values = evaluate([*PAIR, Thing(score=0.9)], PAIR)
    assert values["car_3d_r11_easy"] == pytest.approx(1 / 11)
    assert values["car_3d_r40_easy"] == pytest.approx(2 / 3 / 40)


def test_equal_scores_share_a_threshold():
    # Found and false at the same score: the false positive counts wherever it stands.
    lone = Thing(x=20)
    for found in ([*PAIR, lone], [lone, *PAIR]):
        assert precision(found, PAIR) == pytest.approx(2 / 3)


def test_second_pass_takes_the_largest_overlap_the_first_the_highest_score():
    # The object's score is .9, from the worse box; at lower thresholds the better box is taken and
    # the worse one is left to the second object.
    truths = [Thing(), Thing(x=0.8)]
    worse, better = Thing(x=0.4, score=0.9), Thing(score=0.8)
    metric = KittiAP(measures=["3d"])
    metric.update(detections(worse, better), targets(*truths))
    rows = dim_zero_cat(metric.rows).reshape(2, 2 + 9)  # score, class, three counts per difficulty
    # tp, fp, found: the second object overlaps with the better box by 3.2 / 4.8 < .7 only.
    assert rows[:, 0].tolist() == pytest.approx([0.9, 0.8])
    assert rows[:, 2:5].tolist() == [[1, 0, 1], [1, 0, 0]]


def test_names_in_any_case():
    assert kitti_types(["car", "PERSON_SITTING", "DontCare"]).tolist() == [0, 5, 8]
    with pytest.raises(ValueError, match=re.escape("'bus' is no type of KITTI; the types are Car, Ped")):
        kitti_types(["car", "bus"])


# The reference, and invariants.


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_frames=st.sampled_from([1, 2, 4, 20]))
def test_equals_the_reference(seed, num_frames):
    found, truths = random_scene(seed, num_frames)
    assert evaluate(found, truths) == pytest.approx(reference(found, truths), abs=1e-6)


def test_scenes_are_worth_comparing():
    values = [value for seed in range(5) for value in evaluate(*random_scene(seed, 20)).values()]
    assert len(set(values)) > 60


def test_large_set_equals_the_reference():
    found, truths = random_scene(0, num_frames=60)
    values = evaluate(found, truths)
    assert values["car_2d_r40_hard"] > 0.05
    assert values == pytest.approx(reference(found, truths), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_and_grouping_of_frames_do_not_matter(seed):
    found, truths = random_scene(seed)
    expected = evaluate(found, truths)
    names = [0, 1, 2, 3]
    random.Random(seed).shuffle(names)
    one_by_one = KittiAP()
    for name in names:
        one_by_one.update(
            detections(*(thing for thing in found if thing.frame == name)),
            targets(*(thing for thing in truths if thing.frame == name)),
        )
    assert {key: value.item() for key, value in one_by_one.compute().items()} == expected
    renamed = [[replace(one, frame=names[one.frame] - 7) for one in side] for side in (found, truths)]
    assert evaluate(*renamed) == expected
    distinct = [replace(one, score=0.5 + i / 100) for i, one in enumerate(found)]
    backwards = sorted(distinct, key=lambda one: -one.frame)
    assert evaluate(backwards, truths) == evaluate(distinct, truths)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), score=st.floats(0, 1, width=32))
def test_a_false_positive_never_helps(seed, score):
    found, truths = random_scene(seed)
    before = evaluate(found, truths)
    after = evaluate([*found, Thing(x=90, score=score)], truths)
    assert all(after[key] <= before[key] for key in before)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_only_the_order_of_scores_matters(seed):
    found, truths = random_scene(seed)
    expected = evaluate(found, truths)
    assert evaluate([replace(one, score=one.score**3 - 4) for one in found], truths) == expected


# Processes.


def gather_with(other):
    """What stands in for the communication with one process, which holds the metric `other`."""
    states = iter([getattr(other, name) for name in other._reductions])

    def gather(tensor, group):
        state = next(states)
        # A process without rows sends what torchmetrics makes of them.
        theirs = dim_zero_cat(state or [torch.empty(0)]) if isinstance(state, list) else state
        # What real communication demands.
        assert (theirs.dtype, theirs.shape[1:]) == (tensor.dtype, tensor.shape[1:])
        return [tensor, theirs]

    return gather


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("num_here", range(5))
def test_two_processes_equal_one(num_here, used_before):
    found, truths = random_scene(3)
    here, there = KittiAP(), KittiAP()
    for metric in (here, there) if used_before else ():
        metric.update(detections(*PAIR), targets(*PAIR))
        metric.reset()
    for frame in range(4):
        metric = here if frame < num_here else there
        metric.update(
            detections(*(thing for thing in found if thing.frame == frame)),
            targets(*(thing for thing in truths if thing.frame == frame)),
        )
    with here.sync_context(dist_sync_fn=gather_with(there), distributed_available=lambda: True):
        values = {key: value.item() for key, value in type(here).compute(here).items()}
    assert values == evaluate(found, truths)
    assert max(values.values()) > 0


def test_merged_metrics_equal_one():
    found, truths = random_scene(5)
    first, second = KittiAP(), KittiAP()
    for metric, frames in ((first, (0, 1)), (second, (2, 3))):
        metric.update(
            detections(*(thing for thing in found if thing.frame in frames)),
            targets(*(thing for thing in truths if thing.frame in frames)),
        )
    first.merge_state(second)
    assert {key: value.item() for key, value in first.compute().items()} == evaluate(found, truths)


def test_reset_and_forward():
    found, truths = random_scene(5)
    metric = KittiAP()
    metric.update(detections(*many(50)), targets(*many(50)))
    metric.reset()
    assert set(metric.num_valid().values()) == {0}
    batch = metric(detections(*found), targets(*truths))
    expected = evaluate(found, truths)
    assert {key: value.item() for key, value in batch.items()} == expected
    assert {key: value.item() for key, value in metric.compute().items()} == expected


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": []}, "measures must be one or more of ('2d', 'bev', '3d', 'bev_loose', '3d_loose'), "),
        ({"measures": ["3d", "4d"]}, "'3d_loose'), got ['3d', '4d']."),
        ({"measures": ["3d", "3d"]}, "'3d_loose'), got ['3d', '3d']."),
        ({"height_scale": 0}, "height_scale must be above 0, got 0."),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KittiAP(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"boxes": torch.zeros(2, 6)},
            "boxes of the detections must have shape (2, 7), as there are 2 types, got (2, 6).",
        ),
        (
            {"scores": torch.zeros(3)},
            "scores of the detections must have shape (2,), as there are 2 types, got (3,).",
        ),
        (
            {"types": torch.tensor([0, 9])},
            "types of the detections must lie in [0, 9), got 0 to 9; see kitti_types.",
        ),
        ({"scores": torch.tensor([0, torch.nan])}, "Scores of the detections must be finite"),
    ],
)
def test_refused_detections(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KittiAP().update(detections(*PAIR)._replace(**changes), targets())


def test_refused_targets():
    truths = targets(*PAIR)._replace(occlusion=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=re.escape("occlusion of the targets must have shape (2,), as")):
        KittiAP().update(detections(), truths)
