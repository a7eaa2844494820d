import math
import re
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from altermoma_pl import Masks, top_k
from altermoma_pl.mask.top_k import Scope, check_sparsity
from tests.helpers.masks import shrank
from tests.helpers.sorting import reference

GROUPS = {"a": "camera", "b": "lidar", "c": "camera"}


def tensors(**rows):
    return {name: torch.tensor(row) for name, row in rows.items()}


def kept(masks):
    return {name: mask.int().tolist() for name, mask in masks.items()}


SCORES = tensors(a=[[4.0, -1.0], [0.5, 3.0]], b=[9.0, 8.0, 7.0, 6.0], c=[5.0, 5.5])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sparsity": 0.5}, {"a": [[0, 0], [0, 0]], "b": [1, 1, 1, 1], "c": [0, 1]}),
        ({"sparsity": 0.5, "scope": "layer"}, {"a": [[1, 0], [0, 1]], "b": [1, 1, 0, 0], "c": [0, 1]}),
        ({"sparsity": 0.5, "scope": "row"}, {"a": [[1, 0], [0, 1]], "b": [1, 1, 0, 0], "c": [0, 1]}),
        ({"sparsity": 0.9, "scope": "row"}, {"a": [[0, 0], [0, 0]], "b": [0, 0, 0, 0], "c": [0, 0]}),
        (
            {"sparsity": 0.5, "scope": "modality", "groups": GROUPS},
            {"a": [[1, 0], [0, 0]], "b": [1, 1, 0, 0], "c": [1, 1]},
        ),
        (
            {"sparsity": {"camera": 1 / 6, "lidar": 0.75}, "scope": "modality", "groups": GROUPS},
            {"a": [[1, 0], [1, 1]], "b": [1, 0, 0, 0], "c": [1, 1]},
        ),
        ({"sparsity": 0.5, "min_density": 0.01}, {"a": [[1, 0], [0, 0]], "b": [1, 1, 1, 0], "c": [0, 1]}),
        ({"sparsity": 0.5, "min_density": 0.5}, {"a": [[1, 0], [0, 1]], "b": [1, 1, 0, 0], "c": [0, 1]}),
        ({"sparsity": 0.0}, {"a": [[1, 1], [1, 1]], "b": [1, 1, 1, 1], "c": [1, 1]}),
        ({"sparsity": 0.99}, {"a": [[0, 0], [0, 0]], "b": [0, 0, 0, 0], "c": [0, 0]}),  # round(9.9) = 10
    ],
)
def test_by_hand(arguments, expected):
    assert kept(top_k(SCORES, **arguments)) == expected


def test_the_share_is_of_all_weights_and_pruned_ones_stay_pruned():
    within = Masks(tensors(a=[[True, True], [True, True]], b=[False, False, True, True], c=[True, True]))
    scores = SCORES | {"b": torch.tensor([-math.inf, -math.inf, 7.0, 6.0])}
    masks = top_k(scores, 0.6, within=within)
    assert kept(masks) == {"a": [[0, 0], [0, 0]], "b": [0, 0, 1, 1], "c": [1, 1]}
    assert top_k(scores, 0.2, within=within) == within


def test_a_pruned_weight_stays_pruned_even_with_the_highest_score():
    within = Masks(tensors(a=[False, True, True, True]))
    assert kept(top_k(tensors(a=[9.0, 1.0, 2.0, 3.0]), 0.5, within=within)) == {"a": [0, 0, 1, 1]}
    with_nan = tensors(a=[math.nan, 1.0, 2.0, 3.0])
    assert kept(top_k(with_nan, 0.5, within=within)) == {"a": [0, 0, 1, 1]}


def test_a_floor_does_not_revive_a_dead_tensor():
    within = Masks(tensors(a=[False, False], b=[True, False, True, True]))
    masks = top_k(tensors(a=[1.0, 2.0], b=[1.0, 2.0, 3.0, 4.0]), 0.5, within=within, min_density=0.5)
    assert kept(masks) == {"a": [0, 0], "b": [1, 0, 1, 1]}


def test_the_earlier_of_equal_scores_stays():
    scores = tensors(a=[[1.0, 1.0], [1.0, 2.0]], b=[1.0, 1.0])
    assert kept(top_k(scores, 0.5)) == {"a": [[1, 1], [0, 1]], "b": [0, 0]}


def test_the_tie_breaker_comes_before_the_position_and_after_the_score():
    scores = tensors(a=[1.0, 1.0, 1.0, 2.0], b=[1.0, 0.0])
    ties = tensors(a=[1.0, 3.0, 2.0, 0.0], b=[3.0, 9.0])
    assert kept(top_k(scores, 0.5, tie_breaker=ties)) == {"a": [0, 1, 0, 1], "b": [1, 0]}
    assert kept(top_k(scores, 2 / 3, tie_breaker=ties)) == {"a": [0, 1, 0, 1], "b": [0, 0]}
    floors = top_k(scores, 0.5, tie_breaker=ties, min_density=0.4)
    assert kept(floors) == {"a": [0, 1, 0, 1], "b": [1, 0]}


def test_scores_are_left_alone_and_need_no_gradient():
    scores = {"a": torch.tensor([1.0, 2.0], requires_grad=True)}
    mask = top_k(scores, 0.5)["a"]
    assert mask.tolist() == [False, True]
    assert not mask.requires_grad
    assert scores["a"].tolist() == [1.0, 2.0]


def test_a_scalar_and_an_empty_tensor_count_what_they_hold():
    scores = {"a": torch.tensor(1.0), "b": torch.ones(0, 3), "c": torch.tensor([2.0])}
    masks = top_k(scores, 0.5)
    assert masks["a"].tolist() is False
    assert masks["b"].shape == (0, 3)
    assert masks["c"].tolist() == [True]


def test_rows_of_a_convolution_hold_their_count_and_an_empty_tensor_has_none():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(6, 4, 3, 3, generator=generator), "b": torch.ones(0, 3)}
    masks = top_k(scores, 0.75, scope="row", min_density=0.0)
    assert masks["a"].flatten(1).sum(1).tolist() == [9] * 6
    assert masks["b"].shape == (0, 3)
    for row, mask in zip(scores["a"], masks["a"], strict=True):
        assert float(row[mask].min()) > float(row[~mask].max())


def test_a_transposed_score_is_ranked_row_by_row():
    scores = {"a": torch.tensor([[1.0, 1.0], [0.0, 1.0]]).T}
    assert kept(top_k(scores, 0.5)) == {"a": [[1, 0], [1, 0]]}


def test_floors_are_exact():
    """0.07 * 100 is a little more than 7 in floating point."""
    scores = {"a": torch.arange(100.0), "b": torch.arange(100.0) + 100}
    masks = top_k(scores, 0.5, min_density=0.07)
    assert [int(mask.sum()) for mask in masks.values()] == [7, 93]


@st.composite
def problems(draw, scopes=("global", "layer", "modality")):
    shapes = draw(st.lists(st.sampled_from([(1,), (3,), (2, 2), (5,), (2, 4)]), min_size=1, max_size=4))
    names = list("abcd")[: len(shapes)]
    values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0])

    def draw_tensors(elements, dtype):
        return {
            n: torch.tensor(
                draw(st.lists(elements, min_size=math.prod(s), max_size=math.prod(s))), dtype=dtype
            ).view(s)
            for n, s in zip(names, shapes, strict=True)
        }

    return {
        "scores": draw_tensors(values, torch.float32),
        "sparsity": draw(st.integers(0, 19)) / 20,
        "scope": draw(st.sampled_from(scopes)),
        "within": draw_tensors(st.sampled_from([True, True, True, False]), torch.bool),
        "min_density": draw(st.sampled_from([0.0, 0.0, 0.01, 0.3])),
        "groups": dict(zip(names, ["camera", "lidar", "camera", "lidar"], strict=False)),
        "ties": draw(st.sampled_from([None, 1])) and draw_tensors(values, torch.float32),
    }


@given(problems(get_args(Scope)))
@settings(max_examples=400, deadline=None)
def test_equals_sorting_lists(problem):
    ties = problem.pop("ties")
    expected = reference(ties=ties, **problem)
    arguments = problem | {"within": Masks(problem["within"]), "tie_breaker": ties}
    if expected is None:
        with pytest.raises(ValueError, match=r"masks only shrink, ask for more|lower one of them"):
            top_k(**arguments)
    else:
        masks = top_k(**arguments)
        assert {name: mask.flatten().tolist() for name, mask in masks.items()} == expected


@given(problems(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_invariants(problem, without_floor):
    ties, within = problem.pop("ties"), Masks(problem.pop("within"))
    if without_floor:
        problem["min_density"] = 0.0
    try:
        masks = top_k(within=within, tie_breaker=ties, **problem)
    except ValueError:
        assume(False)
    scores, groups = problem["scores"], problem["groups"]
    assert shrank(masks, within)
    label = {"global": lambda n: 0, "layer": lambda n: n, "modality": groups.get}[problem["scope"]]
    for scope in map(label, scores):
        names = [name for name in scores if label(name) == scope]
        total = sum(scores[name].numel() for name in names)
        count = sum(int(masks[name].sum()) for name in names)
        assert count == total - round(problem["sparsity"] * total)
        best_pruned = max(
            (float(scores[n][within[n] & ~masks[n]].max()) for n in names if (within[n] & ~masks[n]).any()),
            default=-math.inf,
        )
        for name in names:
            floor = math.ceil(round(problem["min_density"] * scores[name].numel(), 9))
            num_kept = int(masks[name].sum())
            assert num_kept >= min(floor, int(within[name].sum()))
            if num_kept > floor:
                # Beyond the floor, nothing that stays is worse than what goes.
                beyond = scores[name][masks[name]].sort(descending=True).values[floor:]
                assert float(beyond.min()) >= best_pruned


@given(problems(), st.integers(0, 19))
@settings(max_examples=80, deadline=None)
def test_pruning_in_two_steps_shrinks(problem, later):
    first = top_k(problem["scores"], min(problem["sparsity"], later / 20))
    second = top_k(problem["scores"], max(problem["sparsity"], later / 20), within=first)
    assert shrank(second, first)
    assert second == top_k(problem["scores"], max(problem["sparsity"], later / 20))


def test_a_million_weights_are_counted_exactly():
    scores = {"a": torch.randn(1000, 999), "b": torch.zeros(1001)}
    masks = top_k(scores, 0.876543)
    assert masks.num_kept == 1_000_001 - round(0.876543 * 1_000_001)


ERRORS = [
    (
        {
            "scope": "row",
            "sparsity": 0.5,
            "within": Masks(tensors(a=[[True, True], [False, False]], b=[True] * 4, c=[True] * 2)),
        },
        "sparsity 0.5 of a row of 'a' is below what is already pruned, 1: masks only shrink",
    ),
    (
        {"scope": "row", "sparsity": 0.8, "min_density": 0.01},
        "sparsity 0.8 of 'a' keeps 0 of 4 weights, but min_density=0.01 protects 1: lower one of them",
    ),
    ({"scores": {}}, "there are no scores: nothing to rank"),
    ({"sparsity": 1.0}, "sparsity must be a share of zeros in [0, 1), got 1.0"),
    ({"sparsity": -0.1}, "sparsity must be a share of zeros in [0, 1), got -0.1"),
    ({"sparsity": math.nan}, "sparsity must be a share of zeros in [0, 1), got nan"),
    ({"sparsity": "0.5"}, "sparsity must be a share of zeros in [0, 1), got '0.5'"),
    ({"min_density": 1.5}, "min_density must be in [0, 1], got 1.5"),
    ({"scope": "block"}, "scope must be one of ['global', 'modality', 'layer', 'row'], got 'block'"),
    (
        {"sparsity": {"camera": 0.5}},
        "one sparsity for each modality needs the scope 'modality', got 'global'",
    ),
    ({"scope": "modality"}, "the scope 'modality' needs the group of each parameter in `groups`"),
    (
        {"scope": "modality", "groups": {"a": "camera"}},
        "`groups` names no group for ['b', 'c']: each parameter with scores needs one",
    ),
    (
        {"scope": "modality", "groups": GROUPS, "sparsity": {"camera": 0.5, "radar": 0.5}},
        "sparsity names ['camera', 'radar'], the groups with weights are ['camera', 'lidar']",
    ),
    (
        {"scope": "modality", "groups": GROUPS, "sparsity": {"camera": 0.5, "lidar": 1.5}},
        "sparsity of 'lidar' must be a share of zeros in [0, 1), got 1.5",
    ),
    (
        {"within": Masks({"a": torch.ones(2, 2, dtype=torch.bool)})},
        "scores and masks name different parameters: ['b', 'c']",
    ),
    (
        {"within": Masks({n: torch.ones(4, dtype=torch.bool) for n in "abc"})},
        "score of 'a' has shape (2, 2), its mask (4,)",
    ),
    (
        {"tie_breaker": {n: torch.ones(4) for n in "abc"}},
        "score of 'a' has shape (2, 2), its tie breaker (4,)",
    ),
    (
        {"tie_breaker": {"a": torch.ones(2, 2)}},
        "scores and tie breakers name different parameters: ['b', 'c']",
    ),
    (
        {"scores": SCORES | {"c": torch.tensor([math.inf, math.nan])}},
        "score of 'c' is not finite at 2 weights",
    ),
    (
        {"within": Masks({n: s > 4 for n, s in SCORES.items()}), "sparsity": 0.3},
        "sparsity 0.3 of the model is below what is already pruned, 0.4: masks only shrink, ask for more",
    ),
    (
        {"min_density": 0.5, "sparsity": 0.6},
        "sparsity 0.6 of the model keeps 4 of 10 weights, but min_density=0.5 protects 5: lower one of them",
    ),
    (
        {"min_density": 0.5, "sparsity": 0.7, "scope": "layer"},
        "sparsity 0.7 of 'a' keeps 1 of 4 weights, but min_density=0.5 protects 2: lower one of them",
    ),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=range(len(ERRORS)))
def test_impossible_requests_are_explained(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        top_k(**({"scores": SCORES, "sparsity": 0.5} | change))


def test_check_sparsity_names_what_it_checks():
    check_sparsity(0)
    check_sparsity(0.999)
    with pytest.raises(ValueError, match=re.escape("target must be a share of zeros in [0, 1), got 2")):
        check_sparsity(2, "target")
