"""How sure a number is: intervals, paired tests over seeds and over examples, equivalence; see docs/statistics.md.

Units are the caller's: shares, points or losses; bounds and results are in the same. What a sample is too small or too
uniform for is None, and a `reason` says why.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ..base.errors import DataError

# Equal scores give differences that differ in their last bits: a spread below this, relative to the values, is none.
_ROUNDING = 32 * np.finfo(float).eps
_RESAMPLES = 10_000
_TAIL = 50 * (1 - 0.95)  # percent on each side of a 95% interval


class Interval(NamedTuple):
    """A two-sided confidence interval. nan where the data do not give one (too few values)."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference with its confidence interval, in the unit of the values (shares: 0.01 = 1 pp)."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanSd:
    """A sample's mean and standard deviation (ddof 1); of one value the latter is None."""

    n: int
    mean: float
    sd: float | None
    reason: str = ""


@dataclass(frozen=True)
class PairedTest:
    """What the differences of n pairs say about their mean.

    Attributes:
        mean, sd: of the differences a - b (ddof 1).
        interval: 95%, Student's t with n - 1 degrees of freedom.
        interval90: 90%; it lies inside ±bound exactly where that bound's TOST p is below 0.05.
        p: two-sided paired t test of no difference.
        tost: bound -> p of the two one-sided tests that the mean lies inside ±bound.
        reason: why fields are None: a single pair, or differences that are all equal.
    """

    n: int
    mean: float
    sd: float | None
    interval: Interval | None
    interval90: Interval | None
    p: float | None
    tost: Mapping[float, float | None]
    reason: str = ""


@dataclass(frozen=True)
class SdRatio:
    """The ratio of two standard deviations with its 95% interval."""

    ratio: float | None
    interval: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class McNemar:
    """Examples that only one of two runs has right, and the exact p of that split being even."""

    n: int
    only_a: int
    only_b: int
    p: float


def proportion_interval(correct: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of `correct` out of `n`. With n = 0 nothing is known: (0, 1).

    `correct` may be a sum of shares, as of examples with several answers each: the interval is then a little wide.

    DataError: correct outside 0..n, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise DataError(f"confidence is {confidence}: it must be between 0 and 1, such as 0.95")
    if n < 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} correct of {n}: correct must be from 0 to n")
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n one end is exactly 0 or 1; rounding must not cross the share itself.
    return Interval(float(max(0.0, min(centre - half, share))), float(min(1.0, max(centre + half, share))))


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's 95% t interval of the mean, for example over seeds (ddof 1).

    One value has no spread: (nan, nan). Values that are all equal give an interval of width zero.
    DataError: no value.
    """
    array = _vector(values)
    if array.size == 1:
        return Interval(math.nan, math.nan)
    mean = float(array.mean())
    error = array.std(ddof=1) / math.sqrt(array.size)
    half = _t_quantile(0.975, array.size - 1) * float(error)
    return Interval(mean - half, mean + half)


def ratio_interval(totals: Sequence[float], counts: Sequence[float]) -> Interval:
    """95% interval of sum(totals) / sum(counts) over examples that are drawn whole, as of a loss a token.

    By linearization, with Student's t (Cochran, Sampling Techniques, section 6.4). One example with a count:
    (nan, nan).
    DataError: no examples, other numbers of totals and counts, or counts that are 0 in sum.
    """
    if len(totals) != len(counts):
        raise DataError(f"{len(totals)} totals and {len(counts)} counts: each example has one of both")
    y, x = _vector(totals), _vector(counts)
    if x.sum() <= 0:
        raise DataError("the counts are 0 in sum, so there is no ratio")
    n, ratio = y.size, float(y.sum() / x.sum())
    if (x > 0).sum() == 1:  # the others have nothing to count
        return Interval(math.nan, math.nan)
    error = math.sqrt(float(((y - ratio * x) ** 2).sum()) * n / (n - 1)) / float(x.sum())
    half = _t_quantile(0.975, n - 1) * error
    return Interval(ratio - half, ratio + half)


def paired_difference(a_correct: Sequence[float], b_correct: Sequence[float]) -> Difference:
    """Mean of a - b over the same examples, with a 95% bootstrap interval (percentile, 10,000 resamples, seed 0).

    Both lists hold one score per example, in the same order. The examples are resampled, so the interval
    tells what other test examples would do; it does not tell what other training seeds would. One example
    has no spread: its interval is (nan, nan).

    DataError: lists of different lengths, or empty ones.
    """
    _check_pairs(a_correct, b_correct, "examples")
    differences = np.asarray(a_correct, dtype=float) - np.asarray(b_correct, dtype=float)
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Difference(mean, math.nan, math.nan)
    # A resample only matters by how often each distinct difference is drawn: at most three for right/wrong.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=_RESAMPLES)
    low, high = np.percentile(draws @ values / n, [_TAIL, 100 - _TAIL])
    return Difference(mean, float(low), float(high))


def mean_sd(values: Sequence[float]) -> MeanSd:
    """Mean and standard deviation (ddof 1) of a condition's seeds. DataError: no value, or one that is not finite."""
    array = _finite(values)
    return _mean_sd(array, float(np.abs(array).max()))


def paired_test(a: Sequence[float], b: Sequence[float], *, bounds: Sequence[float] = ()) -> PairedTest:
    """The paired differences a - b over seeds: mean, t intervals, t test, equivalence (MoE-Sieve, appendix B).

    Args:
        a, b: one value a seed, the same seeds in the same order.
        bounds: of equivalence, in the values' unit; each gets a TOST p.

    Raises:
        DataError: lists of different lengths, empty ones, values that are not finite, or a bound not above 0.
    """
    _check_pairs(a, b, "seeds")
    x, y = _finite(a), _finite(b)
    found = _mean_sd(x - y, float(max(np.abs(x).max(), np.abs(y).max())))
    return paired_test_from_stats(found.mean, found.sd, found.n, bounds=bounds)


def paired_test_from_stats(mean: float, sd: float | None, n: int, *, bounds: Sequence[float] = ()) -> PairedTest:
    """`paired_test` from the differences' mean, standard deviation (ddof 1) and number, as papers print them.

    DataError: fewer than one pair, a negative sd, or a bound not above 0.
    """
    if wrong := [bound for bound in bounds if not 0 < bound < math.inf]:
        raise DataError(f"the bound of equivalence {wrong[0]} is out of range: it must be above 0")
    if n < 1 or (n > 1 and (sd is None or not 0 <= sd < math.inf)):
        raise DataError(f"{n} pairs with the standard deviation {sd}: give at least one pair, and from two on its sd")
    if n == 1 or not sd:
        why = "one pair has no spread" if n == 1 else f"all {n} differences are equal (sd 0)"
        reason = f"{why}: no interval and no test"
        return PairedTest(n, mean, None if n == 1 else 0.0, None, None, None, dict.fromkeys(bounds), reason)
    error = sd / math.sqrt(n)
    # Of the two one-sided tests that of the nearer bound has the larger p.
    tost = {bound: _t_tail((bound - abs(mean)) / error, n - 1) for bound in bounds}
    halves = [_t_quantile(upper, n - 1) * error for upper in (0.975, 0.95)]
    wide, narrow = (Interval(mean - half, mean + half) for half in halves)
    return PairedTest(n, mean, sd, wide, narrow, 2 * _t_tail(abs(mean) / error, n - 1), tost)


def sd_ratio(a: MeanSd, b: MeanSd) -> SdRatio:
    """sd of a over sd of b, with the 95% interval of the F distribution of their variances' ratio.

    It takes both samples as normal and independent. Seeds that are paired are not independent: their correlation makes
    the interval wider than it need be, whatever its sign.
    """
    if a.sd is None or b.sd is None:
        return SdRatio(None, None, "a single value has no standard deviation: no ratio")
    if b.sd == 0:
        return SdRatio(None, None, "the reference's values are all equal (sd 0): no ratio")
    ratio = a.sd / b.sd
    if ratio == 0:
        return SdRatio(0.0, None, "the values are all equal (sd 0): no interval")
    from scipy.special import fdtri

    low, high = (float(fdtri(a.n - 1, b.n - 1, share)) for share in (0.025, 0.975))
    return SdRatio(ratio, Interval(ratio / math.sqrt(high), ratio / math.sqrt(low)))


def mcnemar(a_correct: Sequence[int], b_correct: Sequence[int]) -> McNemar:
    """Exact McNemar test over the same examples: is either run right more often where only one is?

    p is the two-sided binomial test of the examples that only one has right; 1 where there is none.

    DataError: lists of different lengths, empty ones, or shares in place of right and wrong.
    """
    _check_pairs(a_correct, b_correct, "examples")
    a, b = np.asarray(a_correct), np.asarray(b_correct)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise DataError("McNemar's test needs right or wrong for each example, not shares: use paired_difference")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    split = only_a + only_b
    from scipy.special import bdtr

    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), split, 0.5))) if split else 1.0
    return McNemar(len(a), only_a, only_b, p)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that `k` of `n` completions, drawn without putting back, hold one of the `correct` ones.

    The unbiased estimator of Chen et al. 2021 (2107.03374, equation 1), 1 − C(n−c, k) / C(n, k), as their product.

    DataError: k above n or below 1, or correct outside 0..n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise DataError(f"pass@{k} of {correct} correct among {n}: k must be from 1 to {n}, correct from 0 to {n}.")
    if n - correct < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - correct + 1, n + 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of a family of tests, in the order given; None is no test and does not count.

    The largest running maximum of (m - i) p_i over the p values in ascending order, at most 1 (Holm 1979).
    DataError: a p outside 0..1.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    if wrong := [p for p, _ in order if not 0 <= p <= 1]:
        raise DataError(f"p is {wrong[0]}: it must be from 0 to 1")
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for i, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - i) * p))
        corrected[place] = highest
    return corrected


def _mean_sd(values: np.ndarray, magnitude: float) -> MeanSd:
    """`magnitude`: of the numbers that `values` were computed from; it sets what counts as rounding."""
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return MeanSd(1, mean, None, "one value has no spread")
    sd = 0.0 if np.ptp(values) <= _ROUNDING * magnitude else float(values.std(ddof=1))
    return MeanSd(n, mean, sd, "" if sd else f"all {n} values are equal")


def _vector(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise DataError("no value to take a mean of: give at least one number")
    return array


def _finite(values: Sequence[float]) -> np.ndarray:
    array = _vector(values)
    if not np.isfinite(array).all():
        raise DataError(f"{array[~np.isfinite(array)][0]} is among the values: leave out what is not a number")
    return array


def _check_pairs(a: Sequence[float], b: Sequence[float], what: str) -> None:
    if len(a) != len(b) or not len(a):
        raise DataError(
            f"{len(a)} and {len(b)} results: a paired difference needs the same {what} in both, at least one"
        )


# scipy is imported where it is used: with scipy.stats it is a quarter of the time that a report takes.
def _t_quantile(share: float, degrees: int) -> float:
    """Below which `share` of Student's t lies."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, share))


def _t_tail(value: float, degrees: int) -> float:
    """Share of Student's t above `value`."""
    from scipy.special import stdtr

    return float(stdtr(degrees, -value))
