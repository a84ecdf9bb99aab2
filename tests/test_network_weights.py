"""Weights that a network gives: their gradient, rows that were never seen, several processes."""

from __future__ import annotations

import pytest
import torch
from support.problems import normal
from support.visiting import GROUPS, ROWS, built, features_of

from lit_bilevel import ExponentiatedGradient, NetworkWeights
from lit_bilevel.types import Features


def test_the_network_gets_the_gradient_of_the_weighted_mean():
    weights = built("network")
    with torch.no_grad():
        for index, parameter in enumerate(weights.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=index))
    features = features_of(torch.arange(ROWS), normal(ROWS, seed=1).abs())
    score_B = normal(ROWS, seed=2)
    weights.observe(features)
    weights.assign_gradient(features, score_B)
    direction = [normal(*parameter.shape, seed=10 + i) for i, parameter in enumerate(weights.parameters())]
    expected = sum((p.grad * d).sum() for p, d in zip(weights.parameters(), direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(weights.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign * 1e-6)
            values.append((weights.weigh(features) * score_B).mean())
            for parameter, d in zip(weights.parameters(), direction, strict=True):
                parameter.sub_(d, alpha=sign * 1e-6)
    assert float((values[0] - values[1]) / 2e-6) == pytest.approx(float(expected), abs=1e-8)


def test_the_network_weighs_rows_it_never_saw():
    weights = built("network")
    seen = torch.arange(ROWS)[GROUPS == 1][:16], torch.arange(ROWS)[GROUPS == 2][:16]
    optimizer = ExponentiatedGradient(weights.parameters())
    for _ in range(50):
        rows = torch.cat(seen)
        features = features_of(rows, GROUPS)
        weights.observe(features)
        weights.set_gradient(features, GROUPS[rows])
        optimizer.step()
    new = Features(
        torch.tensor([60, 63]), torch.tensor([0, 1]), torch.tensor([6, 6]), torch.tensor([1.0, 2.0]).double()
    )
    low, high = weights(new)
    assert low > high


def test_the_network_is_the_same_on_every_process():
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = built("network").state_dict()
    torch.manual_seed(2)
    second = built("network").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first if "weight" in key)
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch, "manual_seed")  # which would also seed accelerators, and these stay so
        built("network")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(built("network"), NetworkWeights)
