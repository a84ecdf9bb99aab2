"""Several columns of scores as one: normal scores, directions, the prior weights they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_bilevel.errors import UserError
from lit_bilevel.scores.combination import combine, normal_scores, prior_weights


def test_normal_scores_are_quantiles_at_the_ranks():
    values = np.array([3.0, np.nan, 1.0, 2.0, np.inf, 4.0])
    found = normal_scores(values)
    assert found[[1, 4]].tolist() == [0.0, 0.0]  # not known: decided by other columns
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.625, 0.125, 0.375, 0.875]).double())
    np.testing.assert_allclose(found[[0, 2, 3, 5]], expected.numpy(), atol=1e-12)


def test_a_monotone_change_of_a_column_changes_nothing():
    columns = {"ifd": np.random.default_rng(0).random(50), "density_ratio": np.random.default_rng(1).random(50)}
    one = combine(columns, ["ifd", "density_ratio"])
    other = combine({**columns, "density_ratio": np.log(columns["density_ratio"])}, ["ifd", "density_ratio"])
    tail = combine({**columns, "ifd": np.exp(30 * columns["ifd"])}, ["ifd", "density_ratio"])
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, tail)
    assert abs(one.mean()) < 1e-12
    assert abs(one.std() - 1) < 1e-12


def test_columns_are_turned_by_their_direction():
    columns = {"ifd": np.array([0.1, 0.5, 0.9]), "density_ratio": np.array([2.0, 1.0, 0.1])}
    assert (np.diff(combine(columns, ["ifd"])) < 0).all()
    assert (np.diff(combine(columns, ["density_ratio"])) < 0).all()
    with pytest.raises(UserError, match=r"no score 'prompt' to be added; there are: ifd, density_ratio"):
        combine(columns, ["prompt"])
    with pytest.raises(UserError, match="all rows are equal in ifd"):
        combine({"ifd": np.ones(3)}, ["ifd"])


def test_prior_weights_have_mean_one_and_the_ratio_of_their_sharpness():
    z = np.array([-1.0, 0.0, 1.0])
    weights = prior_weights(z, 2.0)
    assert abs(weights.mean() - 1) < 1e-12
    assert abs(weights[2] / weights[0] - np.exp(2.0)) < 1e-9  # σ(x)/σ(−x) = e^x
    np.testing.assert_allclose(prior_weights(z, 0.0), 1.0)
