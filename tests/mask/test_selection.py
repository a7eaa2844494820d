"""The best of many values: against sorting, whatever the bits, the layout and the chunks."""

import math
import re
from collections.abc import Mapping
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from altermoma_pl import Masks, top_k
from altermoma_pl.mask import selection as module
from altermoma_pl.mask.selection import Selection, common_dtype, ordered
from altermoma_pl.mask.top_k import Scope
from tests.helpers.sorting import reference

FLOATS = {16: torch.float16, 17: torch.bfloat16, 32: torch.float32, 64: torch.float64}
TINY = 2.0**-149
NUMBERS = [0.0, -0.0, 0.0, -0.0, TINY, -TINY, 3 * TINY, 1e-40, 65504.0, -65504.0, 1.0, 1 + 2**-23, -1.0, 0.1]
WIDE = [*NUMBERS, 3.4028235e38, -3.4028235e38, 1e-44, -2.0, 1 + 2**-22]
VERY_WIDE = [*WIDE, 1.7976931348623157e308, 5e-324, -5e-324, 1 + 2**-52, 1e-310, -1.7976931348623157e308]
VALUES = {torch.float16: NUMBERS, torch.bfloat16: NUMBERS, torch.float32: WIDE, torch.float64: VERY_WIDE}
SHAPES = [(), (1,), (5,), (0, 3), (2, 3), (3, 4), (2, 2, 2, 2), (4, 0)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)


@pytest.mark.parametrize("dtype", FLOATS.values())
def test_keys_have_the_order_of_the_values(dtype):
    values = torch.tensor([*VALUES[dtype], math.inf, -math.inf], dtype=torch.float64).to(dtype)
    keys = ordered(values, common_dtype([dtype]))
    assert torch.equal(values[:, None] < values, keys[:, None] < keys)
    assert torch.equal(values[:, None] == values, keys[:, None] == keys)


def test_keys_by_hand():
    keys = ordered(torch.tensor([0.0, -0.0, TINY, 1.0, -1.0]), torch.float32)
    assert keys.tolist() == [0, 0, 1, 0x3F800000, -1 - 0x3F800000]
    half = ordered(torch.tensor([-0.0, 1.0], dtype=torch.bfloat16), torch.float32)
    assert half.tolist() == [0, 0x3F800000]
    assert ordered(torch.tensor([7, -7]), torch.int64).tolist() == [7, -7]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.int32], torch.int64),
        ([torch.int32, torch.float16], torch.float32),
    ],
)
def test_the_common_type_holds_all(dtypes, expected):
    assert common_dtype(dtypes) == expected


def draw_tensor(draw, shape, values, dtype):
    size = math.prod(shape)
    flat = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
    tensor = torch.tensor(flat, dtype=torch.float64).to(dtype).view(shape)
    if tensor.ndim > 1 and draw(st.booleans()):  # the same values, laid out otherwise
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


@st.composite
def problems(draw):
    names = list("abcd")[: draw(st.integers(1, 4))]
    shapes = {name: draw(st.sampled_from(SHAPES)) for name in names}
    dtypes = st.sampled_from([*FLOATS.values(), torch.float32, torch.float32])
    few = draw(st.booleans())

    def draw_tensors(dtype_of=dtypes):
        drawn = {name: draw(dtype_of) for name in names}
        return {
            n: draw_tensor(draw, shapes[n], VALUES[d][:4] if few else VALUES[d], d) for n, d in drawn.items()
        }

    kept = st.sampled_from([True, True, True, False])
    return {
        "scores": draw_tensors(),
        "sparsity": draw(st.integers(0, 9)) / 10,
        "scope": draw(st.sampled_from(get_args(Scope))),
        "within": {n: draw_tensor_of_bools(draw, shapes[n], kept) for n in names},
        "min_density": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "groups": dict(zip(names, ["camera", "lidar", "camera", "lidar"], strict=False)),
        "ties": draw(st.sampled_from([None, 1])) and draw_tensors(),
    }


def draw_tensor_of_bools(draw, shape, kept):
    size = math.prod(shape)
    return torch.tensor(draw(st.lists(kept, min_size=size, max_size=size)), dtype=torch.bool).view(shape)


@given(problem=problems(), chunk=st.sampled_from([1, 3, 2**17]), dense=st.booleans())
@settings(max_examples=200, deadline=None)
def test_equals_sorting_whatever_the_bits_the_layout_and_the_chunks(problem, chunk, dense):
    ties = problem.pop("ties")
    if dense:
        problem["within"] = {n: torch.ones_like(m) for n, m in problem["within"].items()}
    expected = reference(ties=ties, **problem)
    within = None if dense else Masks(problem["within"])
    arguments = problem | {"within": within, "tie_breaker": ties}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        if expected is None:
            with pytest.raises(ValueError, match=r"masks only shrink, ask for more|lower one of them"):
                top_k(**arguments)
        else:
            found = {name: mask.flatten().tolist() for name, mask in top_k(**arguments).items()}
            assert found == expected


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("scope", "first", "second"),
    [
        ("global", [[1] * 7, [1] * 7, [1, 1, 1, 0, 0, 0, 0]], [[0] * 7] * 2),
        ("layer", [[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0] * 7], [[1] * 7, [0] * 7]),
        ("row", [[1, 1, 1, 0, 0, 0, 0]] * 3, [[1, 1, 1, 0, 0, 0, 0]] * 2),
    ],
)
def test_ties_in_many_chunks_stay_in_row_major_order(scope, first, second):
    masks = top_k({"a": torch.zeros(3, 7), "b": torch.zeros(7, 2).T}, 0.5, scope)
    assert [mask.int().tolist() for mask in masks.values()] == [first, second]


class Lazy(Mapping):
    """Second scores that are computed when they are asked for."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_tie_breakers_are_read_only_if_scores_are_equal_where_it_matters(scope):
    scores = {"a": torch.tensor([[1.0, 1.0, 4.0, 3.0]]), "b": torch.tensor([[8.0, 9.0, 0.0, 0.0]])}
    ties = Lazy({name: -score for name, score in scores.items()})
    masks = top_k(scores, 0.5, scope, tie_breaker=ties)
    assert {n: m.int().tolist() for n, m in masks.items()} == {"a": [[0, 0, 1, 1]], "b": [[1, 1, 0, 0]]}
    assert ties.read == []


def test_a_tie_breaker_with_other_names_is_refused_without_reading_it():
    ties = Lazy({"b": torch.ones(2)})
    with pytest.raises(ValueError, match="scores and tie breakers name different parameters"):
        top_k({"a": torch.ones(2)}, 0.5, tie_breaker=ties)
    assert ties.read == []


@pytest.mark.parametrize("scope", ["global", "row"])
def test_the_shape_of_a_tie_breaker_is_checked_when_it_is_read(scope):
    ties = Lazy({"a": torch.ones(1, 3)})
    message = re.escape("score of 'a' has shape (1, 2), its tie breaker (1, 3)")
    with pytest.raises(ValueError, match=message):
        top_k({"a": torch.ones(1, 2)}, 0.5, scope, tie_breaker=ties)
    assert ties.read == ["a"]


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("density", [0.0, 0.1])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_a_score_that_is_not_finite_is_named_unless_pruned(scope, density, bad, dtype):
    scores = {"a": torch.ones(2, 3, dtype=dtype), "b": torch.rand(2, 3).to(dtype)}
    if bad is None:  # not-a-number with all bits set, as in memory that was never written
        scores["b"].view(torch.uint8)[0, : dtype.itemsize * 2] = 255
    else:
        scores["b"][0, :2] = bad
    with pytest.raises(ValueError, match="score of 'b' is not finite at 2 weights"):
        top_k(scores, 0.5, scope, min_density=density)
    within = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.isfinite(scores["b"])}
    assert top_k(scores, 0.7, scope, Masks(within), density)["b"].logical_and(~within["b"]).sum() == 0
    within["b"][0, 0] = True
    with pytest.raises(ValueError, match="score of 'b' is not finite at 1 weights"):
        top_k(scores, 0.7, scope, Masks(within), density)


def test_the_largest_finite_numbers_are_finite():
    for dtype in FLOATS.values():
        extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
        assert top_k({"a": extremes}, 0.5)["a"].tolist() == [True, False]


def test_whole_numbers_are_ranked():
    scores = {"a": torch.tensor([3, -5, 2**40, 3]), "b": torch.tensor([7], dtype=torch.int32)}
    masks = top_k(scores, 0.4)
    assert [mask.int().tolist() for mask in masks.values()] == [[1, 0, 1, 0], [1]]


def test_a_selection_keeps_the_best_and_no_others():
    selection = Selection({"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([9.0, 0.0])})
    selection.keep_best_(["a"], 1)
    assert [mask.int().tolist() for mask in selection.kept.values()] == [[0, 0, 0, 1], [0, 0]]
    selection.keep_best_(["a", "b"], 3)
    assert [mask.int().tolist() for mask in selection.kept.values()] == [[0, 0, 1, 1], [1, 0]]
    assert selection.count_kept(["a", "b"]) == {"a": 2, "b": 1}
    selection.keep_best_(["a", "b"], 0)
    assert sum(int(mask.sum()) for mask in selection.kept.values()) == 0


def test_masks_lie_row_major_whatever_the_layout_of_scores():
    score = torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert top_k({"a": score}, 0.5)["a"].is_contiguous()
