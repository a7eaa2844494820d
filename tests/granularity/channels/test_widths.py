import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altermoma_pl.granularity.channels.widths import keep_widths
from tests.helpers.coupled_channels import found


def tensor(*values):
    return torch.tensor(values)


def kept(scores, *arguments, **options):
    return {name: flags.int().tolist() for name, flags in keep_widths(scores, *arguments, **options).items()}


def test_the_lowest_go_first():
    scores = {"a": tensor(4.0, 1.0, 3.0, 2.0), "b": tensor(9.0, 2.5)}
    assert kept(scores, 0.0) == {"a": [1, 1, 1, 1], "b": [1, 1]}
    assert kept(scores, 0.5) == {"a": [1, 0, 1, 0], "b": [1, 0]}
    assert kept(scores, 0.34) == {"a": [1, 0, 1, 0], "b": [1, 0]}  # at least the target: three of six
    assert kept(scores, 2 / 6) == {"a": [1, 0, 1, 0], "b": [1, 1]}


def test_blocks_are_judged_by_their_mean():
    scores = {"a": tensor(1.0, 2.0, 3.0, 5.0, 9.0), "b": tensor(2.5, 0.0, 4.5, 6.0)}
    steps = {"a": 2, "b": 2}
    # a: [1] (the odd one), then [2, 3]; b: [0, 2.5], of mean 1.25.
    assert kept(scores, 1 / 9, steps) == {"a": [0, 1, 1, 1, 1], "b": [1, 1, 1, 1]}
    assert kept(scores, 2 / 9, steps) == {"a": [0, 1, 1, 1, 1], "b": [0, 0, 1, 1]}
    assert kept(scores, 4 / 9, steps) == {"a": [0, 0, 0, 1, 1], "b": [0, 0, 1, 1]}


def test_ties_the_later_loses():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    assert kept(scores, 0.5) == {"a": [1, 1, 0], "b": [1, 0, 0]}


def test_equal_scores_go_from_the_end_whatever_their_means_round_to():
    scores = {"a": torch.full((100,), 0.1, dtype=torch.float64)}
    scores["b"] = scores["a"].clone()
    steps = {"a": 3, "b": 7}  # means of 1, 3, 2 and 7 equal numbers differ in the last bit
    for count in range(1, 40):
        widths = {n: int(f.sum()) for n, f in keep_widths(scores, count / 200, steps).items()}
        assert 200 - sum(widths.values()) - count < 7, widths


def test_means_never_fall():
    from altermoma_pl.granularity.channels.widths import _steps

    ranked = torch.full((100,), 0.1, dtype=torch.float64)
    scores = [step.score for step in _steps("a", ranked, 7, 1)]
    assert len(scores) == 14
    assert scores == sorted(scores)


def test_floors_and_what_was_removed():
    scores = {"a": torch.arange(8.0), "b": torch.arange(8.0) + 100}
    assert kept(scores, 0.4, min_density=0.5) == {"a": [0] * 4 + [1] * 4, "b": [0] * 3 + [1] * 5}
    within = {"a": torch.arange(8) < 4, "b": torch.ones(8, dtype=torch.bool)}
    assert kept(scores, 0.25, within=within)["a"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert kept(scores, 0.3125, within=within)["a"] == [0, 1, 1, 1, 0, 0, 0, 0]


def test_what_is_gone_may_have_any_score():
    scores = {"a": tensor(3.0, torch.nan, 1.0)}
    assert kept(scores, 0.6, within={"a": tensor(True, False, True)}) == {"a": [1, 0, 0]}


def test_a_floor_of_seven_percent_of_a_hundred_is_seven():
    assert 0.07 * 100 > 7
    scores = {"a": torch.arange(100.0)}
    assert sum(kept(scores, 0.93, min_density=0.07)["a"]) == 7


def test_the_target_may_be_a_cost():
    scores = {"a": tensor(1.0, 2.0), "b": tensor(1.5, 2.5)}

    def cost(widths):
        return 10 * widths["a"] + widths["b"]

    assert kept(scores, 0.4, cost=cost) == {"a": [0, 1], "b": [1, 1]}
    assert kept(scores, 0.5, cost=cost) == {"a": [0, 1], "b": [0, 1]}


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        keep_widths({"a": torch.ones(4)}, sparsity)


def test_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="scores of the channels of 'a' are not finite"):
        keep_widths({"a": tensor(1.0, torch.nan)}, 0.5)
    with pytest.raises(ValueError, match="scores of the channels of 'a' are not finite"):
        keep_widths({"a": tensor(1.0, torch.inf)}, 0.5)


def test_a_target_that_cannot_be_reached():
    with pytest.raises(ValueError, match=r"0.8 cannot be reached: .* the most is 0.5; lower round_to"):
        keep_widths({"a": torch.arange(8.0)}, 0.8, {"a": 4})


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    levels = draw(st.sampled_from([1, 3, 1000]))  # few: many ties
    scores = {f"g{i}": torch.randint(levels, (n,), generator=generator) * 0.1 for i, n in enumerate(sizes)}
    steps = {name: draw(st.sampled_from([1, 2, 3, 8])) for name in scores}
    return scores, steps, draw(st.sampled_from([0.0, 0.07, 0.3]))


@settings(max_examples=200, deadline=None)
@given(problem=problems(), sparsity=st.floats(0, 0.9), more=st.floats(0, 0.9))
def test_properties(problem, sparsity, more):
    scores, steps, least = problem
    total = sum(map(len, scores.values()))
    floors = {n: max(1, -(-round(least * len(s), 9) // 1)) for n, s in scores.items()}
    low = {n: min(len(s), -(-int(floors[n]) // steps[n]) * steps[n]) for n, s in scores.items()}
    most = 1 - sum(low.values()) / total
    first = keep_widths(scores, min(sparsity, most), steps, least)
    removed = total - sum(int(flags.sum()) for flags in first.values())
    assert removed >= min(sparsity, most) * total - 1e-9
    assert removed < min(sparsity, most) * total + max(steps.values())
    for name, flags in first.items():
        width = int(flags.sum())
        assert width == len(flags) or width % steps[name] == 0
        assert width >= low[name]
        gone = scores[name][~flags]
        assert not gone.numel() or gone.max() <= scores[name][flags].min()
    target = min(max(sparsity, more), most)
    again = {name: score.flip(0) for name, score in scores.items()}  # of a later event
    second = keep_widths(again, target, steps, least, within=first)
    assert all(bool((first[name] | ~flags).all()) for name, flags in second.items())
    assert total - sum(int(flags.sum()) for flags in second.values()) >= target * total - 1e-9


def test_steps_of_groups():
    group = found("grouped")["0"]  # a channel is one of each of two groups
    assert [group.step(n) for n in (1, 2, 8)] == [1, 1, 4]
    assert found("residual")["stem"].step(8) == 8


def test_groups_that_no_mask_touches_stay_whole():
    channels = found("residual")
    flags = torch.arange(6) < 2
    some = {"a.weight": flags[:, None, None, None].expand(6, 8, 3, 3), "a.bias": flags}
    assert {n: int(f.sum()) for n, f in channels.kept(some).items()} == {"stem": 8, "a": 2}
