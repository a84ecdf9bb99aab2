"""The density ratio of pool and trusted rows: two Gaussians, missing numbers, large pools, few trusted rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lit_bilevel.scores import density
from lit_bilevel.scores.columns import FEATURES
from lit_bilevel.scores.table import columns_of


def shifted(rows: int, trusted: int, shift: float = 0.8, scale: float = 0.7):
    """Pool and trusted rows of two Gaussians, of a third that is noise, and the log of their known ratio."""
    random = np.random.default_rng(0)
    pool, trusty = random.normal(size=(rows, 3)), random.normal(size=(trusted, 3))
    trusty[:, :2] = shift + scale * trusty[:, :2]
    z = (pool[:, :2] - shift) / scale
    return pool, trusty, (pool[:, :2] ** 2 / 2 - z**2 / 2 - np.log(scale)).sum(1)


def ratio(pool: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    return density.density_ratios(pool, trusted, density.MEASURED)[: len(pool)]


def test_the_ratio_of_two_gaussians_is_found():
    pool, trusted, log_ratio = shifted(3000, 600)
    found = ratio(pool, trusted)
    assert found.mean() == pytest.approx(1)
    assert np.corrcoef(np.log(found), log_ratio)[0, 1] > 0.97
    truth = np.exp(log_ratio)
    assert np.abs(found - truth / truth.mean()).mean() < 0.25
    linear = ratio(np.abs(pool), np.abs(trusted))  # and folded, what squares alone cannot tell
    assert np.corrcoef(np.log(linear), log_ratio)[0, 1] < 0.9


def test_equal_rows_have_nearly_equal_weights():
    random = np.random.default_rng(1)
    found = ratio(random.normal(size=(640, 11)), random.normal(size=(128, 11)))
    assert found.std() < 0.35  # the penalty is chosen so that chance is not learned
    assert found.mean() == pytest.approx(1)


def test_no_row_is_scored_by_a_fit_that_saw_its_label():
    pool, trusted, _ = shifted(150, 50)
    features, label = np.concatenate([pool, trusted]), np.arange(200) >= 150
    before = density.cross_fit_log_odds(features, label)
    for row in (3, 170):
        flipped = label.copy()
        flipped[row] = not flipped[row]
        after = density.cross_fit_log_odds(features, flipped)
        assert after[row] == before[row]
        assert (after != before).any()


def test_a_missing_number_does_not_move_a_row_much():
    pool, trusted, _ = shifted(400, 100)
    missing = pool.copy()
    missing[::7, 2] = np.nan  # the noise
    whole, found = ratio(pool, trusted), ratio(missing, trusted)
    assert np.corrcoef(whole, found)[0, 1] > 0.9
    empty = np.full((400, 1), np.nan), np.full((100, 1), np.nan)
    found = ratio(np.hstack([pool, empty[0]]), np.hstack([trusted, empty[1]]))
    assert np.corrcoef(whole, found)[0, 1] > 0.98


def test_a_large_pool_is_fitted_on_a_part_and_scored_whole(monkeypatch):
    pool, trusted, log_ratio = shifted(4000, 300)
    monkeypatch.setattr(density, "MEASURED", replace(density.MEASURED, most=600))
    found = ratio(pool, trusted)
    assert np.corrcoef(np.log(found), log_ratio)[0, 1] > 0.95
    assert found.mean() == pytest.approx(1)


def test_too_few_trusted_rows_are_told():
    with pytest.raises(ValueError, match="at least 10 trusted rows and there are 9"):
        ratio(np.zeros((50, 2)), np.ones((9, 2)))
    assert np.isnan(columns_of(np.ones((4, len(FEATURES)), np.float32), None)[0]["density_ratio"]).all()
