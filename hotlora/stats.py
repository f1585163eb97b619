"""How sure a number is: intervals for accuracies, means and paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from .errors import DataError


class Interval(NamedTuple):
    """A two-sided confidence interval. nan where the data do not give one (too few values)."""

    low: float
    high: float


class Difference(NamedTuple):
    """A difference with its confidence interval, in the unit of the values (shares: 0.01 = 1 pp)."""

    difference: float
    low: float
    high: float


def proportion_interval(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of `correct` out of `n`. With n = 0 nothing is known: (0, 1).

    DataError: correct outside 0..n, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if n < 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} correct of {n}: correct must be from 0 to n")
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = stats.norm.ppf(0.5 + confidence / 2) ** 2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and n one end is exactly 0 or 1; rounding must not cross the share itself.
    return Interval(float(max(0.0, min(centre - half, share))), float(min(1.0, max(centre + half, share))))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean, for example over seeds (ddof 1).

    One value has no spread: (nan, nan). Values that are all equal give an interval of width zero.
    DataError: no value.
    """
    _check_confidence(confidence)
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise DataError("no value to take a mean of: give at least one number")
    if array.size == 1:
        return Interval(math.nan, math.nan)
    mean = float(array.mean())
    error = array.std(ddof=1) / math.sqrt(array.size)
    half = float(stats.t.ppf(0.5 + confidence / 2, array.size - 1) * error)
    return Interval(mean - half, mean + half)


def paired_difference(
    a_correct: Sequence[bool | int | float],
    b_correct: Sequence[bool | int | float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean of a - b over the same examples, with a seeded bootstrap (percentile) interval.

    Both lists hold one score per example, in the same order. The examples are resampled, so the interval
    tells what other test examples would do; it does not tell what other training seeds would. One example
    has no spread: its interval is (nan, nan).

    DataError: lists of different lengths, or empty ones.
    """
    _check_confidence(confidence)
    if len(a_correct) != len(b_correct) or not len(a_correct):
        raise DataError(
            f"{len(a_correct)} and {len(b_correct)} results: a paired difference needs the same examples in "
            "both, at least one"
        )
    differences = np.asarray(a_correct, dtype=float) - np.asarray(b_correct, dtype=float)
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Difference(mean, math.nan, math.nan)
    # A resample only matters by how often each distinct difference is drawn: at most three for right/wrong.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws @ values / n, [tail, 100 - tail])
    return Difference(mean, float(low), float(high))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise DataError(f"confidence is {confidence}: it must be between 0 and 1, such as 0.95")
