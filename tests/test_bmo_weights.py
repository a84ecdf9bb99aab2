"""Weights that are made of running losses: BMO against its formula, its normaliser, and what training uses."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import WEIGHTINGS, normal
from support.visiting import BATCH, EQUAL, GROUPS, ROWS, RUNNING, built, features_of, spread, visit
from torchmetrics.functional.classification import binary_auroc

from lit_bilevel import BMOWeights


def test_bmo_at_export_does_not_know_the_order_of_visits():
    weights = built("bmo")
    falling = EQUAL.clone()
    for rows in torch.randperm(ROWS).split(BATCH):  # losses fall during the epoch
        falling *= 0.9
        weights.observe(features_of(rows, falling))
    assert spread(weights.table()) > 0.1
    weights.score(features_of(torch.arange(ROWS), EQUAL))
    assert spread(weights.table()) < 1e-12


def test_bmo_tells_two_groups_apart():
    table = visit(built("bmo"), None, 3, None, GROUPS)
    assert binary_auroc(table, (GROUPS == 1).long()) == 1.0


def test_bmo_is_the_softmax_of_the_losses():
    weights, loss_N = built("bmo"), normal(ROWS, seed=1).abs()
    weights.observe(features_of(torch.arange(ROWS), loss_N))
    expected = ROWS * torch.softmax(-loss_N / 0.5, 0)
    torch.testing.assert_close(weights.table(), expected)
    torch.testing.assert_close(weights(features_of(torch.arange(ROWS), loss_N)), expected)


def test_the_running_normaliser_is_that_of_the_method():
    weights, losses = BMOWeights(temperature=0.7, decay=0.9), normal(5, ROWS, seed=2).abs()
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    running = 0.0
    for step, loss_N in enumerate(losses):
        weights.observe(features_of(torch.arange(ROWS), loss_N))
        running = 0.9 * running + 0.1 * (-loss_N / 0.7).exp().mean()
        torch.testing.assert_close(weights.log_normaliser, (running / (1 - 0.9 ** (step + 1))).log())


def test_a_window_without_a_finite_loss_is_not_counted():
    weights, other = built("bmo"), built("bmo")
    rows, loss_N = torch.arange(ROWS), normal(ROWS, seed=2).abs()
    for each, windows in ((weights, (torch.nan, 1.0, torch.inf, 2.0)), (other, (1.0, 2.0))):
        for factor in windows:
            each.observe(features_of(rows, loss_N * factor))
    assert torch.equal(weights.log_normaliser, other.log_normaliser)
    assert all(torch.equal(weights.statistics()[key], other.statistics()[key]) for key in ("effective_size", "entropy"))


def test_before_any_window_every_row_weighs_one():
    for name in RUNNING:
        weights = built(name)
        assert torch.equal(weights(features_of(torch.arange(ROWS), GROUPS)), torch.ones(ROWS).double())
        assert weights.statistics()["effective_size"] == ROWS
        assert float(weights.statistics()["entropy"]) == pytest.approx(math.log(ROWS))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_weights_that_training_uses_have_mean_one(name):
    """Each window's, over the first few hundred steps, in which the losses of a young policy fall fast."""
    weights, generator = built(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(normal(*parameter.shape, seed=4))
    weights.recount()
    hard_N, means = normal(ROWS, seed=5).abs() / 2, []
    for step in range(300):
        rows = torch.randperm(ROWS, generator=generator)[: 2 * BATCH]
        features = features_of(rows, hard_N + 1.0 + 0.5 * math.exp(-step / 60))
        weights.observe(features)
        means.append(weights(features).mean())
    parts = torch.stack([part.mean() for part in torch.stack(means).split(60)])
    assert (parts - 1).abs().max() < 0.3, parts  # the normaliser is some hundred windows behind
    assert parts[-1] == pytest.approx(1, abs=0.1)


def test_losses_too_large_for_exp():
    weights = built("bmo")
    weights.observe(features_of(torch.arange(ROWS), GROUPS * 1e4))
    assert torch.isfinite(weights.table()).all()
    assert abs(weights.table().mean() - 1) < 1e-12
