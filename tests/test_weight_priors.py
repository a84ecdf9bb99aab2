"""Weights that begin at earlier ones, or are set from scores of the whole pool."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import normal
from support.visiting import EQUAL, GROUPS, ROWS, built, features_of, visit

from lit_bilevel import ExponentiatedGradient, SoftmaxWeights
from lit_bilevel.errors import UserError


def test_the_pull_to_the_prior_settles_at_the_softmax_of_the_scores():
    weights = SoftmaxWeights(kl_to_prior=0.5)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    rows, scores, prior = torch.arange(ROWS), normal(ROWS, seed=4), normal(ROWS, seed=6).exp()
    weights.set_prior(prior)
    optimizer = ExponentiatedGradient(weights.parameters(), lr=0.1)
    for _ in range(3000):
        weights.set_gradient(features_of(rows, EQUAL), scores)
        optimizer.step()
        weights.after_step()
    b = (weights.table() * scores).mean()
    scaled = ((scores - b) / (scores - b).abs().mean()).clamp(-3, 3)
    expected = ROWS * torch.softmax(weights.log_prior_N.double() - scaled / 0.5, 0)
    torch.testing.assert_close(weights.table(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "softmax+temperature", "softmax+cap"])
def test_a_table_starts_from_earlier_weights(name):
    weights, earlier = built(name), normal(ROWS, seed=4).exp()
    earlier = (earlier / earlier.mean()).clamp_max(2.0)
    earlier = earlier / earlier.mean()
    weights.set_prior(earlier)
    torch.testing.assert_close(weights.table(), earlier)


def test_sources_start_from_the_mean_of_their_rows():
    weights = built("source")
    weights.set_prior(GROUPS * torch.where(torch.arange(ROWS) < 32, 0.5, 1.5))
    torch.testing.assert_close(weights.table(), GROUPS / 1.5)


def test_equal_weights_refuse_a_prior():
    with pytest.raises(UserError, match="SigmoidWeights"):
        built("uniform").set_prior(GROUPS)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "network", "bmo"])
def test_learning_multiplies_the_prior(name):
    """The weights that learning gives after a prior are those without it, times the prior, over their mean."""
    prior = normal(ROWS, seed=4).exp()
    tables = []
    for weights in (built(name), built(name)):
        if tables:
            weights.set_prior(prior)
            features = features_of(torch.arange(ROWS), EQUAL)
            torch.testing.assert_close(weights(features).double(), prior / prior.mean())  # before any step
        if name == "bmo":
            weights.observe(features_of(torch.arange(ROWS), normal(ROWS, seed=5).abs()))
        elif name == "network":
            with torch.no_grad():
                weights.network[-1].weight.fill_(0.5)
            weights.observe(features_of(torch.arange(ROWS), normal(ROWS, seed=5).abs()))
        else:
            with torch.no_grad():
                weights.logits.copy_(normal(ROWS, seed=5))
            weights.recount()
        tables.append(weights.table())
    torch.testing.assert_close(tables[1], prior * tables[0] / (prior * tables[0]).mean(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "network", "bmo", "source"])
def test_weights_of_a_prior_have_mean_one(name):
    weights = built(name)
    weights.set_prior(GROUPS * 3)
    weights.observe(features_of(torch.arange(ROWS), EQUAL))
    assert abs(float(weights(features_of(torch.arange(ROWS), EQUAL)).double().mean()) - 1) < 1e-5


def test_a_row_of_prior_zero_stays_near_zero_and_learning_goes_on():
    weights = built("softmax")
    prior = torch.ones(ROWS)
    prior[3] = 0.0
    weights.set_prior(prior)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 5, lambda step, rows: rows.double(), EQUAL)
    assert table.isfinite().all()
    assert table[3] < 1e-6
    assert table[0] > table[ROWS - 1]


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, -1.0], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_a_prior_that_says_nothing_is_refused(bad):
    weights = SoftmaxWeights()
    weights.build(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="prior"):
        weights.set_prior(torch.tensor(bad))


def test_scores_of_the_whole_pool_settle_in_closed_form():
    prior, scores = normal(ROWS, seed=4).exp(), normal(ROWS, seed=5)
    weights = SoftmaxWeights(kl_to_prior=0.5)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    weights.set_prior(prior)
    p = prior / prior.mean()
    centred = scores - (p * scores).mean()
    weights.settle(scores, 0.5)
    expected = p * torch.exp(-(centred / centred.abs().mean()).clamp(-3, 3) / 0.5)
    torch.testing.assert_close(weights.table(), expected / expected.mean(), rtol=1e-5, atol=1e-9)
    features = features_of(torch.arange(ROWS), EQUAL)
    torch.testing.assert_close(weights(features), weights.table())  # the running sums know it


def test_a_row_without_a_finite_score_settles_at_its_prior():
    weights = built("softmax")
    scores = normal(ROWS, seed=5)
    scores[2] = math.nan
    weights.settle(scores, 1.0)
    assert weights.table().isfinite().all()
    assert weights.logits[2] == 0
    weights.settle(torch.full((ROWS,), math.nan), 1.0)
    torch.testing.assert_close(weights.table(), torch.ones(ROWS).double())
