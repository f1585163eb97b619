"""Intervals against scipy and numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from hotlora.errors import DataError
from hotlora.stats import mean_interval, paired_difference, proportion_interval


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (124, 200), (1, 3), (500, 1319), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(correct, n, confidence):
    expected = scipy_stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    low, high = proportion_interval(correct, n, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand():
    # z = 1.959964; 8 of 10: centre (0.8 + z2/20) / (1 + z2/10), as in Wilson's 1927 formula
    z2 = 1.959963984540054**2
    centre, spread = (0.8 + z2 / 20) / (1 + z2 / 10), math.sqrt(z2 * (0.016 + z2 / 400)) / (1 + z2 / 10)
    assert proportion_interval(8, 10) == pytest.approx((centre - spread, centre + spread))
    assert proportion_interval(0, 0) == (0.0, 1.0)


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_inside(n, share):
    correct = round(share * n)
    low, high = proportion_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1 and low < high


def test_mean_interval_equals_scipy():
    values = np.random.default_rng(0).normal(60, 2, 8)
    expected = scipy_stats.t.interval(0.95, 7, loc=values.mean(), scale=scipy_stats.sem(values))
    assert mean_interval(list(values)) == pytest.approx(expected)


def test_mean_interval_with_one_value_and_without_spread():
    assert all(map(math.isnan, mean_interval([3.0])))
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(DataError, match="no value"):
        mean_interval([])


def test_paired_difference_by_hand():
    a, b = [1, 1, 1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1, 1, 0]
    difference, low, high = paired_difference(a, b)
    assert difference == 2 / 8
    assert -0.5 < low < 0.25 < high < 1
    reverse = paired_difference(b, a)
    assert reverse.difference == -difference and reverse.low == pytest.approx(-high, abs=1 / 8)
    assert paired_difference(a, b) == (difference, low, high)  # seeded


def test_paired_difference_agrees_with_the_normal_interval_on_many_examples():
    rng = np.random.default_rng(1)
    a, b = rng.random(2000) < 0.62, rng.random(2000) < 0.55
    d = a.astype(float) - b.astype(float)
    half = 1.959964 * d.std(ddof=1) / math.sqrt(2000)
    result = paired_difference(a.tolist(), b.tolist())
    assert result.difference == pytest.approx(d.mean())
    assert (result.low, result.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.002)


def test_paired_difference_edges():
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0, 0, 0)
    one = paired_difference([True], [False])
    assert one.difference == 1 and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(DataError, match="2 and 1 results"):
        paired_difference([1, 0], [1])
    with pytest.raises(DataError, match="0 and 0 results"):
        paired_difference([], [])


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_share(confidence):
    with pytest.raises(DataError, match="confidence"):
        proportion_interval(1, 2, confidence)


@pytest.mark.parametrize(("correct", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_correct_is_within_n(correct, n):
    with pytest.raises(DataError, match="correct must be from 0 to n"):
        proportion_interval(correct, n)
