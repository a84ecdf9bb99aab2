"""Confidence intervals of means, and permutation tests of differences.

    interval       mean ± t_{0.975, n−1} · s / √n               over seeds (Student)
    error          s / √n                                       of a mean over n rows
    permutation    p = (1 + #{|mean(±d)| ≥ |mean d|}) / (1 + R)   signs of the paired differences d_i at random

The test says whether two trained policies (or means over seeds of them) differ on rows like these; it says nothing of
what other seeds would give, which is what the interval is for. Left out: corrections for many comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t by degrees of freedom, from 1; beyond 30 about 1.96 + 2.4 / freedom."""
ROUNDS = 9_999


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: NaN for fewer than two values."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    freedom = len(values) - 1
    if freedom < 1:
        return mean, math.nan
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom / len(values))
    return mean, error * (STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom)


def standard_error(value_n: np.ndarray) -> float:
    """How far the mean of [n] values may be from that over all rows like them; NaN for fewer than two."""
    return float(value_n.std(ddof=1) / math.sqrt(len(value_n))) if len(value_n) > 1 else math.nan


def permutation_test(difference_n: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences being 0.

    Args:
        difference_n: [n] one difference a test row.
        rounds: R; p is at least 1 / (1 + R).
        seed: of the signs.
    """
    random = np.random.default_rng(seed)
    observed = abs(difference_n.sum()) * (1 - 1e-12)  # sums of the same numbers in another order differ by rounding
    extreme, left = 0, rounds
    while left:
        part = min(left, 1000)
        sign = random.integers(0, 2, (part, len(difference_n)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(sign @ difference_n) >= observed).sum())
        left -= part
    return (1 + extreme) / (1 + rounds)
