import itertools
import math
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from altermoma_pl import Masks
from altermoma_pl.mask.n_of_m import at_most, keep_n_of_m
from tests.helpers.masks import follows, shrank

TWO_OF_FOUR = (2, 4)
ROWS = [[4.0, -1.0, 0.5, 3.0, 1.0, 2.0, 3.0, 4.0]]


def kept(masks):
    return {name: mask.int().tolist() for name, mask in masks.items()}


def masks_of(**rows):
    return Masks({name: torch.tensor(row).bool() for name, row in rows.items()})


# ------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [
        (2, 4, [[1, 0, 0, 1, 0, 0, 1, 1]]),
        (1, 4, [[1, 0, 0, 0, 0, 0, 0, 1]]),
        (1, 2, [[1, 0, 0, 1, 0, 1, 0, 1]]),
        (5, 8, [[1, 0, 0, 1, 0, 1, 1, 1]]),
    ],
)
def test_the_best_of_each_block(n, m, expected):
    assert kept(keep_n_of_m({"a": torch.tensor(ROWS)}, n, m)) == {"a": expected}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.0, [[1, 1, 1, 1, 1, 1, 1, 1]]),
        (0.125, [[1, 0, 1, 1, 1, 1, 1, 1]]),  # candidates are -1, 0.5, 1 and 2
        (0.375, [[1, 0, 0, 1, 0, 1, 1, 1]]),
        (0.44, [[1, 0, 0, 1, 0, 0, 1, 1]]),  # round(3.52) = 4
        (0.5, [[1, 0, 0, 1, 0, 0, 1, 1]]),
        (0.5 + 1e-12, [[1, 0, 0, 1, 0, 0, 1, 1]]),
    ],
)
def test_below_the_final_sparsity_the_lowest_candidates_go(sparsity, expected):
    assert kept(keep_n_of_m({"a": torch.tensor(ROWS)}, *TWO_OF_FOUR, sparsity)) == {"a": expected}


def test_candidates_of_all_layers_compete_and_others_do_not():
    """The lowest score, 1, is not pruned: it is among the best two of its block."""
    scores = {"a": torch.tensor([[1.0, 1.5, -3.0, -2.0]]), "b": torch.tensor([[5.0, 6.0, 7.0, 8.0]])}
    assert kept(keep_n_of_m(scores, *TWO_OF_FOUR, 3 / 8)) == {"a": [[1, 1, 0, 0]], "b": [[0, 1, 1, 1]]}


def test_blocks_of_a_convolution_are_input_channels_at_each_kernel_position():
    """(1, 4, 1, 2): the channels of the first kernel column are 1, 2, 3, 4, of the second 8, 7, 6, 5."""
    score = torch.tensor([[[[1.0, 8.0]], [[2.0, 7.0]], [[3.0, 6.0]], [[4.0, 5.0]]]])
    (mask,) = keep_n_of_m({"a": score}, *TWO_OF_FOUR).values()
    assert mask[0, :, 0, 0].tolist() == [False, False, True, True]
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False]


def test_blocks_of_a_transposed_convolution_lie_along_its_first_dimension():
    score = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
    masks = keep_n_of_m({"a": score}, *TWO_OF_FOUR, input_dims={"a": 0})
    assert kept(masks) == {"a": [[0, 1], [0, 1], [1, 0], [1, 0]]}
    assert follows(masks, *TWO_OF_FOUR, {"a": 0})


def test_the_earlier_of_equal_scores_stays():
    scores = {"a": torch.zeros(2, 4), "b": torch.tensor([[0.0, 1.0, 0.0, 0.0]])}
    assert kept(keep_n_of_m(scores, *TWO_OF_FOUR)) == {"a": [[1, 1, 0, 0]] * 2, "b": [[1, 1, 0, 0]]}
    gradual = keep_n_of_m(scores, *TWO_OF_FOUR, 4 / 12)
    assert kept(gradual) == {"a": [[1, 1, 1, 1], [1, 1, 0, 0]], "b": [[1, 1, 0, 0]]}


def test_what_is_pruned_stays_pruned_whatever_its_score():
    within = masks_of(a=[[0, 1, 1, 1, 1, 1, 1, 1]])
    scores = {"a": torch.tensor([[math.nan, -1.0, 0.5, 3.0, 1.0, 2.0, 3.0, 4.0]])}
    assert kept(keep_n_of_m(scores, *TWO_OF_FOUR, within=within)) == {"a": [[0, 0, 1, 1, 0, 0, 1, 1]]}
    assert keep_n_of_m(scores, *TWO_OF_FOUR, 0.125, within) == within
    assert kept(keep_n_of_m(scores, *TWO_OF_FOUR, 0.25, within)) == {"a": [[0, 0, 1, 1, 1, 1, 1, 1]]}


def test_an_empty_tensor_has_no_blocks():
    scores = {"a": torch.ones(0, 4), "b": torch.tensor(ROWS)}
    dense = Masks.dense(scores)
    for sparsity, within in ((None, None), (0.25, None), (None, dense), (0.25, dense)):
        masks = keep_n_of_m(scores, *TWO_OF_FOUR, sparsity, within)
        assert masks["a"].shape == (0, 4)
        assert int(masks["b"].sum()) == (4 if sparsity is None else 6)


def test_scores_are_left_alone_and_need_no_gradient():
    scores = {"a": torch.tensor(ROWS, requires_grad=True)}
    masks = keep_n_of_m(scores, *TWO_OF_FOUR, 0.25)
    assert not masks["a"].requires_grad
    assert scores["a"].tolist() == ROWS


# ------------------------------------------------------------------------------------------- errors


def refused(message, scores, **options):
    with pytest.raises(ValueError, match=re.escape(message)):
        keep_n_of_m(scores, *TWO_OF_FOUR, **options)


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.25}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value, options):
    refused("score of 'a' is not finite at 1 weights", {"a": torch.tensor([[value, 1, 2, 3]])}, **options)


@pytest.mark.parametrize(
    ("shape", "input_dims", "message"),
    [
        ((8,), {}, "'a' of shape (8,) has no input dimension for 2:4: exclude it with prunable: ['!a']"),
        ((), {}, "'a' of shape () has no input dimension for 2:4"),
        (
            (4, 6),
            {},
            "input dimension 1 of 'a', 6 of shape (4, 6), is not divisible by 4 as 2:4 needs it: "
            "exclude it with prunable: ['!a']",
        ),
        ((6, 4), {"a": 0}, "input dimension 0 of 'a', 6 of shape (6, 4), is not divisible by 4"),
        ((4, 4), {"a": 2}, "input_dims['a'] must be in [0, 1], got 2"),
        ((4, 4), {"a": -1}, "input_dims['a'] must be in [0, 1], got -1"),
        ((4, 4), {"b": 0}, "input_dims names ['b'], but there are only ['a']"),
    ],
)
def test_what_has_no_blocks_is_refused(shape, input_dims, message):
    refused(message, {"a": torch.ones(shape)}, input_dims=input_dims)


def test_a_sparsity_above_the_final_one_is_refused():
    message = "sparsity 0.9 is above 0.5, which is all that 2:4 prunes: set sparsity to 0.5, or keep"
    refused(message, {"a": torch.ones(4, 4)}, sparsity=0.9)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, "half"])
def test_what_is_no_sparsity_is_refused(sparsity):
    refused("sparsity must be a share of zeros in [0, 1)", {"a": torch.ones(4, 4)}, sparsity=sparsity)


def test_a_sparsity_below_what_is_pruned_is_refused():
    within = masks_of(a=[[0, 0, 1, 1, 1, 1, 1, 1]])
    message = "sparsity 0.125 of the model is below what is already pruned, 0.25"
    refused(message, {"a": torch.tensor(ROWS)}, sparsity=0.125, within=within)


@pytest.mark.parametrize("sparsity", [None, 0.4])
def test_masks_that_keep_too_few_of_a_block_are_refused(sparsity):
    within = masks_of(a=[[0, 0, 0, 1, 1, 1, 1, 1]])
    message = "masks of before leave 1 of 4 weights in a block of 'a', 2:4 keeps 2: start from a dense"
    refused(message, {"a": torch.tensor(ROWS)}, sparsity=sparsity, within=within)


def test_nothing_to_rank_and_masks_of_others_are_refused():
    refused("there are no scores: nothing to rank", {})
    refused("name different parameters: ['a', 'b']", {"a": torch.ones(1, 4)}, within=masks_of(b=[[1] * 4]))


@pytest.fixture
def sharded(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)])
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_refused(sharded):
    scores, masks = torch.ones(4, 4), Masks({"a": sharded(torch.ones(4, 4).bool())})
    message = "'a' is sharded over processes, and 2:4 sparsity needs whole tensors: use one device or DDP"
    refused(message, {"a": sharded(scores)})
    refused(message, {"a": scores}, within=masks)


# ------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1, 0, 0, 0, 1, 0, 1], True),
        ([0, 0, 0, 0, 0, 1, 0, 0], True),
        ([0, 1, 1, 1, 0, 0, 0, 0], False),
        ([0, 0, 1, 1, 1, 1, 0, 0], True),
        ([1, 0, 0, 0, 0, 0], False),  # no blocks of four
    ],
)
def test_at_most_two_of_four(row, expected):
    mask = torch.tensor([row]).bool()
    assert at_most(mask, *TWO_OF_FOUR) is expected
    assert at_most(mask.T, *TWO_OF_FOUR, 0) is expected


# ------------------------------------------------------------------------------------------- properties


@st.composite
def cases(draw):
    """N, M, scores with many ties, and input dimensions."""
    m = draw(st.integers(2, 6))
    n = draw(st.integers(1, m - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    levels = draw(st.sampled_from([2, 5, 10**6]))
    scores, dims = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        shape = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
        dims[name] = draw(st.integers(0, 1))
        shape[dims[name]] *= m
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]))
        scores[name] = torch.randint(-levels, levels, shape, generator=generator).to(dtype)
    return n, m, scores, dims


def reference(scores, n, m, sparsity, within, dims):
    """The same by sorting lists of weights."""
    blocks = {}
    for i, (name, score) in enumerate(scores.items()):
        for position, index in enumerate(torch.cartesian_prod(*map(torch.arange, score.shape)).tolist()):
            block = (name, *index[: dims[name]], index[dims[name]] // m, *index[dims[name] + 1 :])
            if within is None or within[name][tuple(index)]:
                blocks.setdefault(block, []).append((-score[tuple(index)].item(), i, position))
    total = sum(score.numel() for score in scores.values())
    best = [weight for block in blocks.values() for weight in sorted(block)[:n]]
    rest = [weight for block in blocks.values() for weight in sorted(block)[n:]]
    chosen = best + sorted(rest)[: total - round(sparsity * total) - len(best)]
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    flat = [mask.view(-1) for mask in masks.values()]
    for _, i, position in chosen:
        flat[i][position] = True
    return Masks(masks)


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=3).map(sorted)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_each_block_keeps_n_and_doing_it_again_changes_nothing(case):
    n, m, scores, dims = case
    masks = keep_n_of_m(scores, n, m, input_dims=dims)
    assert follows(masks, n, m, dims)
    assert masks == reference(scores, n, m, 1 - n / m, None, dims)
    assert all(at_most(mask, n, m, dims[name]) for name, mask in masks.items())
    assert keep_n_of_m(scores, n, m, within=masks, input_dims=dims) == masks


@given(cases(), SHARES, st.booleans())
@settings(max_examples=100, deadline=None)
def test_gradual_targets_are_exact_and_only_shrink(case, shares, new_scores):
    n, m, scores, dims = case
    total = sum(score.numel() for score in scores.values())
    earlier = None
    for share in [*shares, 1.0]:
        target = share * (1 - n / m)
        masks = keep_n_of_m(scores, n, m, target, earlier, dims)
        assert masks == reference(scores, n, m, target, earlier, dims)
        assert masks.num_kept == total - round(target * total)
        assert earlier is None or shrank(masks, earlier)
        earlier = masks
        if new_scores:
            scores = {name: -score for name, score in scores.items()}
    assert follows(earlier, n, m, dims)


@given(cases(), SHARES)
@settings(max_examples=50, deadline=None)
def test_with_the_same_scores_a_higher_target_keeps_a_part_of_a_lower_one(case, shares):
    n, m, scores, dims = case
    chain = [keep_n_of_m(scores, n, m, share * (1 - n / m), input_dims=dims) for share in shares]
    chain.append(keep_n_of_m(scores, n, m, input_dims=dims))
    assert all(shrank(later, earlier) for earlier, later in itertools.pairwise(chain))


def test_many_weights_in_chunks():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(64, 64, 3, 3, 5, generator=generator), "b": torch.randn(700, 512)}
    masks = keep_n_of_m(scores, *TWO_OF_FOUR, 0.4)
    assert masks.num_kept == masks.num_weights - round(0.4 * masks.num_weights)
    final = keep_n_of_m(scores, *TWO_OF_FOUR, within=masks)
    assert final == keep_n_of_m(scores, *TWO_OF_FOUR)
    assert follows(final, *TWO_OF_FOUR)
