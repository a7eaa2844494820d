"""Means and intervals by hand."""

import math

import pytest

from altermoma_pl.compare import Estimate, paired_difference


def test_interval_by_hand():
    found = Estimate.of([1, 2, 3, 4, 5])
    # The standard deviation is sqrt(2.5), the t quantile of 4 degrees of freedom 2.776445.
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.mean, found.num_seeds) == (3, 5)
    assert found.half_width == pytest.approx(half, rel=1e-6)
    assert (found.low, found.high) == (pytest.approx(3 - half, rel=1e-6), pytest.approx(3 + half, rel=1e-6))
    assert found.text() == "3.000 ± 1.963"
    assert found.text(1) == "3.0 ± 2.0"
    assert found.interval() == "+3.000 [+1.037, +4.963]"


def test_pairing_removes_what_seeds_have_in_common():
    found = paired_difference([1.1, 5.2, 9.3], [1, 5, 9])
    # Differences 0.1, 0.2, 0.3: standard deviation 0.1, t quantile of 2 degrees of freedom 4.302653.
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert found.interval(2) == "+0.20 [-0.05, +0.45]"


def test_pairs_must_match():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired_difference([1, 2], [1])


def test_one_seed_has_no_interval():
    found = Estimate.of([0.25])
    assert found == Estimate(0.25, math.inf, 1)
    assert (found.text(), found.interval()) == ("0.250", "+0.250")
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan], [math.inf, 1.0], [math.inf, -math.inf]])
def test_what_is_not_finite_makes_the_mean_unknown(values):
    found = Estimate.of(values)
    assert math.isnan(found.mean)
    assert math.isnan(found.half_width)
    assert (found.text(), found.interval()) == ("nan", "nan")


def test_equal_values_have_an_interval_of_zero():
    assert Estimate.of([0.5, 0.5, 0.5]).text() == "0.500 ± 0.000"
