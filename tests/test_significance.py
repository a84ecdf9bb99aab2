"""What a difference between methods is worth: the permutation test, Student's interval, seeds in common."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lit_bilevel.comparison.significance import interval, permutation_test
from lit_bilevel.comparison.table import difference, share_of_gap, slower


def test_the_permutation_test_agrees_with_all_sign_flips():
    difference = np.array([0.9, -0.2, 0.5, 0.4, -0.1, 0.6, 0.3, 0.2])
    flips = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(flips) >= abs(difference.sum()) - 1e-9)
    assert permutation_test(difference) == pytest.approx(exact, abs=0.01)


def test_the_permutation_test_finds_what_is_there_and_no_more():
    random = np.random.default_rng(0)
    assert permutation_test(random.normal(0.2, 1, 1000), rounds=999) == 0.001
    none = [permutation_test(random.normal(0, 1, 100), rounds=199, seed=i) for i in range(100)]
    assert 0.3 < np.mean(none) < 0.7  # uniform where there is no difference
    assert permutation_test(np.zeros(5)) == 1


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-6)
    assert interval([0.0, 1.0] * 16)[1] == pytest.approx(2.0395 * (8 / 31 / 32) ** 0.5, rel=2e-3)
    assert np.isnan(interval([1.0])[1])
    assert np.isnan(interval([])[0])


def test_differences_are_over_the_seeds_that_both_have():
    losses = {
        "mixing": {0: np.array([2.0, 2.0]), 1: np.array([9.0, 9.0])},  # an unlucky seed
        "oracle": {0: np.array([1.0, 1.0]), 1: np.array([9.0, 9.0])},
        "mine": {0: np.array([1.5, 1.5])},
        "other": {2: np.array([1.0, 1.0])},
    }
    assert difference("mine", losses).startswith("-0.5000 (")
    assert share_of_gap("mine", losses) == "0.50"
    assert (difference("other", losses), share_of_gap("other", losses)) == ("–", "–")
    assert (difference("mixing", losses), share_of_gap("mixing", losses)) == ("0", "0.00")
    times = [[{"seed": seed, "seconds": seconds} for seed, seconds in part] for part in ([(0, 3)], [(0, 2), (1, 50)])]
    assert slower(*times) == "1.50"
