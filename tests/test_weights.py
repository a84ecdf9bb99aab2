"""Every weighting: mean 1 and finite, whatever the order of rows, padding, precision or a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from support.problems import WEIGHTINGS, normal
from support.visiting import GROUPS, ROWS, RUNNING, built, features_of, visit

from lit_bilevel import ExponentiatedGradient, NetworkWeights, SoftmaxWeights
from lit_bilevel.errors import UserError
from lit_bilevel.types import PADDING_ROW, Features
from lit_bilevel.weights.optimizer import check_optimizer


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_nonnegative_and_of_mean_one(name):
    weights = built(name)
    rows = torch.arange(ROWS)
    loss_N = normal(ROWS, seed=3).abs()

    def check():
        table = weights.table()
        assert torch.isfinite(table).all()
        assert table.min() >= 0
        assert abs(table.mean() - 1) < 1e-12
        if name not in RUNNING:
            assert abs(weights(features_of(rows, loss_N)).mean() - 1) < 1e-9
            torch.testing.assert_close(weights(features_of(rows, loss_N)).double(), table, rtol=0, atol=1e-9)

    check()
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    visit(weights, optimizer, 5, lambda step, rows: loss_N[rows] * 3, loss_N, check=check)
    check()
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(1e4)  # extreme logits
    weights.recount()
    check()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_statistics_are_those_of_the_table(name):
    weights = built(name)
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    visit(weights, optimizer, 3, lambda step, rows: GROUPS[rows], GROUPS)
    if name in RUNNING:
        visit(weights, None, 6, None, GROUPS)  # running means over windows, so the weights have to stand still
    table, statistics = weights.table(), weights.statistics()
    share = table / table.sum()
    tolerance = 0.05 if name in RUNNING else 1e-9
    assert float(statistics["effective_size"] * (share**2).sum()) == pytest.approx(1, rel=tolerance)
    if "entropy" in statistics:
        entropy = -torch.xlogy(share, share).sum()
        assert float(statistics["entropy"]) == pytest.approx(float(entropy), rel=tolerance)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_permuting_rows_permutes_weights(name):
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    scores = normal(ROWS, seed=6).abs()
    plain, permuted = built(name), WEIGHTINGS[name]()
    sources = torch.empty(ROWS, dtype=torch.int64)
    sources[order] = torch.arange(ROWS) % 2
    permuted.build(sources, torch.float64)

    def run(weights, place):
        optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
        return visit(weights, optimizer, 4, lambda step, rows: scores[rows], scores, order=place)

    torch.testing.assert_close(run(plain, torch.arange(ROWS)), run(permuted, order)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_padding_weighs_nothing(name):
    weights = built(name)
    rows = torch.tensor([0, PADDING_ROW, 2])
    out = weights(Features(rows, torch.tensor([0, 0, 0]), torch.tensor([3, 3, 3]), torch.ones(3).double()))
    assert out[1] == 0
    assert out[0] > 0


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_checkpoint_brings_everything_back(name):
    weights, other = built(name), built(name)
    optimizer = ExponentiatedGradient(weights.parameters()) if weights.learnable else None
    loss_N = normal(ROWS, seed=8).abs()
    visit(weights, optimizer, 2, lambda step, rows: loss_N[rows], loss_N)
    other.load_state_dict(copy.deepcopy(weights.state_dict()))
    tables = []
    for each in (weights, other):
        optimizer = ExponentiatedGradient(each.parameters()) if each.learnable else None
        tables.append(visit(each, optimizer, 2, lambda step, rows: loss_N[rows], loss_N, seed=9))
    assert torch.equal(*tables)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_precision_is_kept_when_the_module_is_cast(name):
    weights = built(name, torch.float32)
    before = {key: value.dtype for key, value in weights.state_dict().items()}
    weights.to(torch.bfloat16)
    assert {key: value.dtype for key, value in weights.state_dict().items()} == before


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_what_is_logged_follows_the_weights_to_another_device(name):
    weights = built(name).to("meta")
    assert {value.device.type for value in (weights.visits, *weights.statistics().values())} == {"meta"}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 0}, "temperature"),
        ({"floor": 1}, "floor"),
        ({"keep": 0}, "keep"),
        ({"keep": 0.5, "cap": 2}, "cap"),
        ({"cap": 1}, "cap"),
        ({"keep": 0.5, "floor": 0.1}, "floor"),
        ({"kl_to_prior": -1}, "kl_to_prior"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        SoftmaxWeights(**settings)


def test_one_source_is_refused():
    weights = WEIGHTINGS["source"]()
    weights.build(torch.ones(4, dtype=torch.int64))  # a group of refined rows may have one source
    assert torch.equal(weights.table(), torch.ones(4).double())
    assert torch.isfinite(torch.stack(list(weights.statistics().values()))).all()
    with pytest.raises(UserError, match="`source` column"):
        check_optimizer(weights, ExponentiatedGradient(weights.parameters()))


def test_any_number_of_sources_is_remembered():
    weights = NetworkWeights()
    weights.build(torch.arange(40_000))
    assert torch.equal(weights.source_N.long(), torch.arange(40_000))
