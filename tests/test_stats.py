"""Intervals and tests against scipy, numbers worked by hand, and MoE-Sieve's published rows."""

import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from hotlora.base.errors import DataError
from hotlora.evaluation.stats import (
    MeanSd,
    holm,
    mcnemar,
    mean_interval,
    mean_sd,
    paired_difference,
    paired_test,
    paired_test_from_stats,
    pass_at_k,
    proportion_interval,
    sd_ratio,
)
from hotlora.papers.settings import SEEDS as SEEDS_OF
from hotlora.report.published import EQUIVALENCE, SEED_SD

SEEDS = len(SEEDS_OF["moe-sieve"])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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


def test_paired_difference_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(3)
    a, b = rng.random(300) < 0.6, rng.random(300) < 0.5
    d = a.astype(float) - b
    how = {"n_resamples": 4000, "method": "percentile"}
    how["rng" if "rng" in inspect.signature(scipy_stats.bootstrap).parameters else "random_state"] = rng
    theirs = scipy_stats.bootstrap((d,), np.mean, **how).confidence_interval
    assert paired_difference(list(a), list(b))[1:] == pytest.approx(theirs, abs=0.007)


def test_mean_sd():
    assert mean_sd([1.0, 2.0, 4.0]) == MeanSd(3, 7 / 3, pytest.approx(math.sqrt(7 / 3)))
    assert mean_sd([0.1] * 3) == MeanSd(3, pytest.approx(0.1), 0.0, "all 3 values are equal")
    assert mean_sd([0.5]) == MeanSd(1, 0.5, None, "one value has no spread")
    with pytest.raises(DataError, match="no value"):
        mean_sd([])
    with pytest.raises(DataError, match="nan is among the values"):
        mean_sd([1.0, math.nan])


@pytest.mark.parametrize("n", [2, 3, 8, 40])
@pytest.mark.parametrize("shift", [-1.5, 0.0, 0.4])
def test_paired_test_equals_scipy(n, shift):
    rng = np.random.default_rng(n)
    b = rng.normal(60, 2, n)
    a = b + rng.normal(shift, 0.7, n)
    found = paired_test(list(a), list(b), bounds=(0.5, 1, 2))
    theirs = scipy_stats.ttest_rel(a, b)
    assert (found.n, found.mean, found.sd) == (n, pytest.approx((a - b).mean()), pytest.approx((a - b).std(ddof=1)))
    assert found.p == pytest.approx(theirs.pvalue)
    for interval, confidence in ((found.interval, 0.95), (found.interval90, 0.9)):
        expected = scipy_stats.t.interval(confidence, n - 1, loc=(a - b).mean(), scale=scipy_stats.sem(a - b))
        assert interval == pytest.approx(expected)
        assert interval == pytest.approx(theirs.confidence_interval(confidence))
    for bound, p in found.tost.items():
        low = scipy_stats.ttest_1samp(a - b, -bound, alternative="greater").pvalue
        high = scipy_stats.ttest_1samp(a - b, bound, alternative="less").pvalue
        assert p == pytest.approx(max(low, high))
    assert found.reason == ""


def test_paired_test_by_hand():
    # Differences 1, 2, 3, 2: mean 2, sd sqrt(2/3), error sqrt(1/6); t(.975, 3) = 3.18245, t(.95, 3) = 2.35336.
    found = paired_test([61, 64, 64, 67], [60, 62, 61, 65], bounds=(3,))
    error = math.sqrt(1 / 6)
    assert found.interval == pytest.approx((2 - 3.182446 * error, 2 + 3.182446 * error))
    assert found.interval90 == pytest.approx((2 - 2.353363 * error, 2 + 2.353363 * error))
    # Student's t with 3 degrees of freedom in closed form.
    t = 2 / error
    tail = 0.5 - (math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (3 + t * t)) / math.pi
    assert found.p == pytest.approx(2 * tail)
    t = 1 / error
    tail = 0.5 - (math.atan(t / math.sqrt(3)) + t * math.sqrt(3) / (3 + t * t)) / math.pi
    assert found.tost[3] == pytest.approx(tail)


@given(mean=st.floats(-4, 4), sd=st.floats(0.01, 4), n=st.integers(2, 30), bound=st.floats(0.1, 5))
def test_tost_passes_exactly_where_the_90_interval_is_inside(mean, sd, n, bound):
    found = paired_test_from_stats(mean, sd, n, bounds=(bound,))
    inside = -bound < found.interval90.low and found.interval90.high < bound
    assert (found.tost[bound] < 0.05) == inside
    mirrored = paired_test_from_stats(-mean, sd, n, bounds=(bound,))
    assert mirrored.tost[bound] == pytest.approx(found.tost[bound]) and mirrored.p == pytest.approx(found.p)


@pytest.mark.parametrize(
    ("a", "b", "mean"),
    [
        ([0.62, 0.61, 0.65], [0.60, 0.59, 0.63], 0.02),  # equal but for their last bits
        ([0.3, 0.1, 0.7], [0.3, 0.1, 0.7], 0.0),
        ([0, 0], [0, 0], 0.0),
    ],
)
def test_equal_differences_are_told_and_not_divided_by(a, b, mean):
    found = paired_test(a, b, bounds=(0.01, 0.1))
    assert (found.mean, found.sd) == (pytest.approx(mean), 0.0)
    assert found.interval is found.interval90 is found.p is None and found.tost == {0.01: None, 0.1: None}
    assert found.reason == f"all {len(a)} differences are equal (sd 0): no interval and no test"


def test_a_small_spread_is_not_rounding():
    found = paired_test([0.62, 0.61 + 1e-9], [0.60, 0.59])
    assert found.sd == pytest.approx(1e-9 / math.sqrt(2), rel=1e-4) and found.p is not None


def test_one_pair_is_told():
    found = paired_test([0.7], [0.5], bounds=(0.1,))
    assert (found.n, found.mean, found.sd, found.p, found.tost) == (1, pytest.approx(0.2), None, None, {0.1: None})
    assert found.interval is None and found.reason == "one pair has no spread: no interval and no test"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: paired_test([1, 2], [1]), "2 and 1 results.*same seeds"),
        (lambda: paired_test([], []), "0 and 0 results"),
        (lambda: paired_test([1, math.inf], [1, 2]), "inf is among the values"),
        (lambda: paired_test([1, 2], [1, 2], bounds=(0,)), "bound of equivalence 0 is out of range"),
        (lambda: paired_test_from_stats(1, 1, 8, bounds=(-1,)), "bound of equivalence -1"),
        (lambda: paired_test_from_stats(1, None, 8), "8 pairs with the standard deviation None"),
        (lambda: paired_test_from_stats(1, -1, 8), "the standard deviation -1"),
        (lambda: paired_test_from_stats(1, 1, 0), "0 pairs"),
        (lambda: mcnemar([1, 0.5], [1, 0]), "not shares"),
        (lambda: mcnemar([1], []), "1 and 0 results"),
        (lambda: holm([0.1, 1.2]), "p is 1.2"),
        (lambda: pass_at_k(3, 1, 4), "pass@4 of 1 correct among 3"),
        (lambda: pass_at_k(3, 4, 1), "pass@1 of 4 correct among 3"),
    ],
)
def test_what_cannot_be_tested_is_an_error(call, says):
    with pytest.raises(DataError, match=says):
        call()


def test_sd_ratio_by_hand_and_against_scipy():
    # F(.975; 7, 7) = 4.9949, as tables have it; with equal sizes the interval is the ratio by and times its root.
    found = sd_ratio(MeanSd(8, 0, 0.015), MeanSd(8, 0, 0.026))
    assert found.ratio == pytest.approx(0.015 / 0.026)
    assert found.interval == pytest.approx((found.ratio / math.sqrt(4.99491), found.ratio * math.sqrt(4.99491)))
    found = sd_ratio(MeanSd(5, 0, 3.0), MeanSd(9, 0, 2.0))
    low, high = scipy_stats.f.interval(0.95, 8, 4)  # (s_b / s_a)^2 (sigma_a / sigma_b)^2 is F with (8, 4)
    assert found.interval == pytest.approx((1.5 * math.sqrt(low), 1.5 * math.sqrt(high)))


def test_sd_ratio_says_what_it_lacks():
    one, none, some = mean_sd([1.0]), mean_sd([2.0, 2.0]), mean_sd([1.0, 3.0])
    assert (sd_ratio(one, some).ratio, sd_ratio(some, one).ratio, sd_ratio(some, none).ratio) == (None, None, None)
    assert "single value" in sd_ratio(some, one).reason and "reference's values" in sd_ratio(some, none).reason
    found = sd_ratio(none, some)
    assert (found.ratio, found.interval) == (0.0, None) and "no interval" in found.reason


@pytest.mark.parametrize("correlation", [0.0, 0.8, -0.8])
def test_pairing_widens_the_sd_ratios_interval_and_never_narrows_it(correlation):
    rng, draws, n = np.random.default_rng(0), 1500, 8
    covariance = [[4.0, 2 * correlation], [2 * correlation, 1.0]]
    pairs = rng.multivariate_normal([0, 0], covariance, size=(draws, n))
    sds = pairs.std(axis=1, ddof=1)
    intervals = [sd_ratio(MeanSd(n, 0, a), MeanSd(n, 0, b)).interval for a, b in sds]
    covered = np.mean([low <= 2 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.015) if correlation == 0 else covered > 0.98


@pytest.mark.parametrize("split", [(0, 0), (1, 0), (9, 2), (2, 9), (30, 30), (51, 20)])
def test_mcnemar_is_the_binomial_test_of_the_examples_that_differ(split):
    only_a, only_b = split
    a = [1] * only_a + [0] * only_b + [1, 0, 1]
    b = [0] * only_a + [1] * only_b + [1, 0, 1]
    found = mcnemar(a, b)
    assert (found.n, found.only_a, found.only_b) == (only_a + only_b + 3, only_a, only_b)
    total = sum(split)
    tail = sum(math.comb(total, k) for k in range(min(split) + 1)) / 2**total
    assert found.p == pytest.approx(min(1.0, 2 * tail))  # the distribution is symmetric
    if total:
        assert found.p == pytest.approx(scipy_stats.binomtest(only_a, total).pvalue)


def test_pass_at_k_is_what_drawing_every_subset_says():
    for n, c in ((1, 0), (1, 1), (7, 0), (7, 2), (7, 7)):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(20, 3, 10) == pytest.approx(1 - (10 * 9 * 8) / (20 * 19 * 18))
    assert pass_at_k(200_000, 1, 100_000) == pytest.approx(0.5)


def test_holm_by_hand():
    # Ordered .005, .01, .03, .04 times 4, 3, 2, 1 is .02, .03, .06, .04; the last may not fall below .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([None]) == [None] and holm([]) == []
    assert holm([0.03]) == [0.03]


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_rejects_what_the_step_down_does(p_values):
    rejected, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
    for i, place in enumerate(order):
        if (len(order) - i) * p_values[place] >= 0.05:
            break
        rejected.add(place)
    assert {i for i, p in enumerate(holm(p_values)) if p < 0.05} == rejected


def rounded(value: float, digits: int) -> np.ndarray:
    """Numbers that are printed as `value`."""
    return np.linspace(value - 0.5 * 10**-digits, value + 0.5 * 10**-digits, 11)


# Qwen on HellaSwag: its only other number, the t test's p, is "<.001", so its sd is not known.
@pytest.mark.parametrize("pair", [pair for pair in EQUIVALENCE if EQUIVALENCE[pair]["t_test"] > 0.001])
def test_moe_sieves_equivalence_rows(pair):
    """Table 8 has mean and t-test p: together they give the sd, and so every TOST p of the row at once.

    Only Spider's rows also give table 3's interval: the others' pairs were sorted (docs/moe-sieve.md), table 3's not.
    """
    row, found, with_interval = EQUIVALENCE[pair], [], []
    for mean, p in itertools.product(rounded(row["difference"], 2), rounded(row["t_test"], 3)):
        sd = abs(mean) / scipy_stats.t.isf(p / 2, SEEDS - 1) * math.sqrt(SEEDS)
        test = paired_test_from_stats(mean, sd, SEEDS, bounds=tuple(row["tost"]))
        tost = all(
            value < 0.001 if shown == 0.001 else abs(value - shown) < 0.0005001
            for value, shown in zip(test.tost.values(), row["tost"].values(), strict=True)
        )
        ends = np.abs(np.subtract(test.interval, row["interval"])) < 0.005001
        found.append(tost and abs(test.p - p) < 1e-9)
        with_interval.append(found[-1] and ends.all())
    assert any(found)
    assert any(with_interval) == (pair[1] == "spider")


def test_moe_sieves_row_without_a_spread_is_possible():
    row = EQUIVALENCE["Qwen1.5-MoE-A2.7B", "hellaswag"]
    # An sd below .16 points is what "p < .001" at one point asks for; table 6's .1 and .2 points allow it.
    for sd, passes in ((0.15, True), (0.17, False)):
        test = paired_test_from_stats(row["difference"], sd, SEEDS, bounds=(1, 2, 3))
        assert all(p < 0.001 for p in (test.p, *test.tost.values())) == passes


def test_of_moe_sieves_six_sd_ratios_one_is_told_from_one():
    apart = []
    for pair, (full, hot, ratio) in SEED_SD.items():
        assert (hot - 0.0005) / (full + 0.0005) <= ratio <= (hot + 0.0005) / (full - 0.0005)
        low, high = sd_ratio(MeanSd(SEEDS, 0, ratio), MeanSd(SEEDS, 0, 1.0)).interval
        if not low <= 1 <= high:
            apart.append(pair)
    assert apart == [("Qwen1.5-MoE-A2.7B", "spider")]
