"""Overlap of rotated boxes: by hand, by invariants, and against shapely."""

import math
import re

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from altermoma_pl.metrics import rotated_iou as module
from altermoma_pl.metrics.rotated_iou import rotated_intersection, rotated_iou_3d, rotated_iou_bev

UNIT = (0.0, 0.0, 1.0, 1.0, 0.0)


def iou(a, b):
    return rotated_iou_bev(torch.tensor(a), torch.tensor(b)).item()


def polygons(boxes):
    """Shapely polygons of (N, 5) rectangles."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    local = signs * boxes[:, None, 2:4] / 2
    cos, sin = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
    x = cos * local[..., 0] - sin * local[..., 1] + boxes[:, :1]
    y = sin * local[..., 0] + cos * local[..., 1] + boxes[:, 1:2]
    return shapely.polygons(np.stack([x, y], axis=-1))


def expected_iou(a, b, grid_size=None):
    a, b = polygons(a), polygons(b)
    common = shapely.area(shapely.intersection(a, b, grid_size=grid_size))
    union = shapely.area(a) + shapely.area(b) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def random_pairs(num, seed=0):
    """Pairs that mostly overlap, of cars and of much thinner and longer things."""
    rng = np.random.default_rng(seed)
    low, high = [-3, -3, 0.1, 0.1, -7], [3, 3, 6, 3, 7]
    return rng.uniform(low, high, (num, 5)), rng.uniform(low, high, (num, 5))


# By hand.


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (UNIT, UNIT, 1.0),
        (UNIT, (5.0, 0.0, 1.0, 1.0, 0.0), 0.0),
        (UNIT, (1.0, 0.0, 1.0, 1.0, 0.0), 0.0),  # a common side
        (UNIT, (1.0, 1.0, 1.0, 1.0, 0.0), 0.0),  # a common corner
        (UNIT, (0.5, 0.0, 1.0, 1.0, 0.0), 1 / 3),
        (UNIT, (0.0, 0.0, 1.0, 1.0, math.pi / 4), 2 * (math.sqrt(2) - 1) / (4 - 2 * math.sqrt(2))),
        (UNIT, (0.1, 0.1, 0.5, 0.4, 0.3), 0.2),  # contained: a / b
        ((0.0, 0.0, 4.0, 2.0, 0.0), (0.0, 0.0, 2.0, 4.0, math.pi / 2), 1.0),
        ((0.0, 0.0, 4.0, 2.0, 0.0), (0.0, 0.0, 4.0, 2.0, math.pi / 2), 4 / 12),
        (UNIT, (0.0, 0.0, 0.0, 1.0, 0.0), 0.0),
        (UNIT, (0.0, 0.0, -1.0, 1.0, 0.0), 0.0),
        ((0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0, 0.0), 0.0),  # no area: 0, not NaN
    ],
)
def test_rectangles_by_hand(a, b, expected):
    assert iou(a, b) == pytest.approx(expected, abs=1e-7)
    assert iou(b, a) == pytest.approx(expected, abs=1e-7)


def test_unit_squares_at_45_degrees():
    turned = torch.tensor([0.0, 0.0, 1.0, 1.0, math.pi / 4], dtype=torch.float64)
    area = rotated_intersection(torch.tensor(UNIT), turned)
    assert area.item() == pytest.approx(0.8284, abs=1e-4)
    assert rotated_iou_bev(torch.tensor(UNIT), turned).item() == pytest.approx(0.7071, abs=1e-4)


@pytest.mark.parametrize(
    ("z", "height", "expected"),
    [(0.0, 2.0, 1.0), (1.0, 2.0, 1 / 3), (2.0, 2.0, 0.0), (0.5, 1.0, 0.5), (0.0, 0.0, 0.0), (0.0, -1.0, 0.0)],
)
def test_height_by_hand(z, height, expected):
    box = torch.tensor([1.0, 2.0, 0.0, 4.0, 2.0, 2.0, 0.4])
    other = torch.tensor([1.0, 2.0, z, 4.0, 2.0, height, 0.4])
    assert rotated_iou_3d(box, other).item() == pytest.approx(expected, abs=1e-7)
    assert rotated_iou_3d(other, box).item() == pytest.approx(expected, abs=1e-7)


def test_matrix_by_broadcasting():
    a, b = (torch.tensor(boxes[:7]) for boxes in random_pairs(7))
    matrix = rotated_iou_bev(a[:, None], b[:5])
    assert matrix.shape == (7, 5)
    assert matrix.dtype == torch.float64
    one_by_one = [[rotated_iou_bev(x, y) for y in b[:5]] for x in a]
    assert_close(matrix, torch.tensor(one_by_one, dtype=torch.float64))


def test_no_boxes():
    assert rotated_iou_bev(torch.zeros(0, 1, 5), torch.zeros(3, 5)).shape == (0, 3)
    assert rotated_iou_3d(torch.zeros(2, 1, 7), torch.zeros(0, 7)).shape == (2, 0)


def test_chunks_change_nothing(monkeypatch):
    a, b = map(torch.tensor, random_pairs(50))
    at_once = rotated_iou_bev(a, b)
    monkeypatch.setattr(module, "_MAX_PAIRS", 7)
    assert torch.equal(rotated_iou_bev(a, b), at_once)


# Against shapely.


def test_random_pairs_equal_shapely():
    a, b = random_pairs(10_000)
    found = rotated_iou_bev(torch.tensor(a), torch.tensor(b)).numpy()
    assert np.mean(found > 0) > 0.4
    np.testing.assert_allclose(found, expected_iou(a, b), atol=1e-9)


def touching(a, b):
    """`b` moved along the x axis of `a` until their sides touch, with the yaw of `a`."""
    offset = (a[:, 2:3] + b[:, 2:3]) / 2 * np.stack([np.cos(a[:, 4]), np.sin(a[:, 4])], axis=1)
    return np.concatenate([a[:, :2] + offset, b[:, 2:4], a[:, 4:]], axis=1)


SPECIAL = {
    "identical": lambda a, b: a,
    "quarter_turn": lambda a, b: a + np.array([0, 0, 0, 0, np.pi / 2]),
    "almost": lambda a, b: a + 1e-12,
    "nested": lambda a, b: a * [1, 1, 0.5, 0.25, 1],
    "shared_sides": lambda a, b: a * [1, 1, 2, 1, 1],
    "touching": touching,
    "thin": lambda a, b: b * [1, 1, 0, 1, 1],
    "point": lambda a, b: a * [1, 1, 0, 0, 1],
    "parallel": lambda a, b: np.concatenate([b[:, :4], a[:, 4:]], axis=1),
    "grid": lambda a, b: np.concatenate([np.round(b[:, :4]), np.pi / 2 * np.round(b[:, 4:])], axis=1),
}


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_pairs_equal_shapely(special):
    a, b = random_pairs(1000, seed=1)
    other = special(a, b)
    for x, y in ((a, other), (other, a)):
        found = rotated_iou_bev(torch.tensor(x), torch.tensor(y)).numpy()
        # On a grid, because shapely in plain floats finds no area in 4 of the pairs that share sides.
        np.testing.assert_allclose(found, expected_iou(x, y, grid_size=1e-10), atol=1e-7, rtol=0)


def test_far_from_the_origin_in_float32():
    a, b = (torch.tensor(boxes, dtype=torch.float32) for boxes in random_pairs(200))
    a[:, :2] += 1000
    b[:, :2] += 1000
    expected = expected_iou(a.double().numpy(), b.double().numpy())
    np.testing.assert_allclose(rotated_iou_bev(a, b).numpy(), expected, atol=1e-9)


def test_upright_boxes_equal_shapely_times_height():
    (a, b), rng = random_pairs(1000), np.random.default_rng(2)
    z, height = rng.uniform(-1, 1, (2, 1000)), rng.uniform(0.1, 3, (2, 1000))
    common = shapely.area(shapely.intersection(polygons(a), polygons(b)))
    top = np.min(z + height / 2, axis=0)
    common *= (top - np.max(z - height / 2, axis=0)).clip(min=0)
    volume = a[:, 2] * a[:, 3] * height[0] + b[:, 2] * b[:, 3] * height[1]
    boxes = [
        torch.tensor(np.column_stack([rectangle[:, :2], low, rectangle[:, 2:4], high, rectangle[:, 4]]))
        for rectangle, low, high in zip((a, b), z, height, strict=True)
    ]
    found = rotated_iou_3d(*boxes).numpy()
    np.testing.assert_allclose(found, common / (volume - common), atol=1e-9)


# Invariants.

coordinate = st.integers(-8, 8).map(lambda n: n / 4)
side = st.integers(0, 12).map(lambda n: n / 4)
angle = st.one_of(st.floats(-7, 7), st.integers(-8, 8).map(lambda n: n * math.pi / 4))
rectangle = st.tuples(coordinate, coordinate, side, side, angle).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@settings(max_examples=200, deadline=None)
@given(a=rectangle, b=rectangle, shift=st.tuples(coordinate, coordinate), turn=angle)
def test_invariants(a, b, shift, turn):
    value = rotated_iou_bev(a, b)
    assert 0 <= value <= 1
    assert_close(rotated_iou_bev(b, a), value, atol=1e-9, rtol=0)
    half_turn = torch.tensor([0, 0, 0, 0, math.pi])
    assert_close(rotated_iou_bev(a + half_turn, b), value, atol=1e-6, rtol=0)
    swapped = a[[0, 1, 3, 2, 4]] + half_turn / 2
    assert_close(rotated_iou_bev(swapped, b), value, atol=1e-6, rtol=0)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    moved = [
        torch.cat([rotation @ box[:2] + torch.tensor(shift), box[2:4], box[4:] + turn]) for box in (a, b)
    ]
    assert_close(rotated_iou_bev(*moved), value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("function", "shapes"), [(rotated_iou_bev, [(3, 5), (3, 7)]), (rotated_iou_3d, [(7,), (5,)])]
)
def test_refused_shapes(function, shapes):
    columns = shapes[0][-1]
    message = f"Boxes must be (..., {columns}), got {shapes[0]} and {shapes[1]}."
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*map(torch.zeros, shapes))
