"""Steps of weights: noise is not blown up, groups are told apart, gradients are those of the method."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import WEIGHT_OPTIMIZERS, normal
from support.visiting import BATCH, EQUAL, GROUPS, LEARNED, ROWS, accepted, built, features_of, spread, visit
from torchmetrics.functional.classification import binary_auroc

from lit_bilevel import ExponentiatedGradient, SoftmaxWeights
from lit_bilevel.errors import UserError
from lit_bilevel.weights.optimizer import check_optimizer

# ---- order of visits ----


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_equal_scores_leave_weights_equal(name, optimizer):
    def drifting(step, rows):
        return (3 + 2 * math.sin(step / 7)) * torch.ones(len(rows)).double() * 0.999**step

    weights = built(name)
    table = visit(weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()), 20, drifting, EQUAL)
    assert spread(table) < 1e-6


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_rounding_noise_is_not_blown_up(name, optimizer):
    noise = normal(200 * ROWS // BATCH, BATCH, seed=1)
    weights = built(name)
    table = visit(
        weights,
        WEIGHT_OPTIMIZERS[optimizer](weights.parameters()),
        200,
        lambda step, rows: 3 * (1 + 1e-7 * noise[step]),
        EQUAL,
    )
    assert spread(table) < 1e-2


@pytest.mark.parametrize(("name", "optimizer"), accepted())
def test_two_groups_are_told_apart(name, optimizer):
    weights = built(name)
    table = visit(
        weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()), 10, lambda step, rows: GROUPS[rows], GROUPS
    )
    assert binary_auroc(table, (GROUPS == 1).long()) == 1.0


@pytest.mark.parametrize("optimizer", ["sparse_adam", "sgd+momentum", "adam", "adamw", "rmsprop"])
def test_an_optimizer_that_spoils_the_order_is_refused(optimizer):
    weights = SoftmaxWeights()
    weights.build(torch.zeros(4, dtype=torch.int64))
    made = WEIGHT_OPTIMIZERS[optimizer](weights.parameters())
    with pytest.raises(UserError, match=f"`{type(made).__name__}` is not safe for `SoftmaxWeights`") as error:
        check_optimizer(weights, made)
    assert "ExponentiatedGradient" in str(error.value) or "set both to 0" in str(error.value)


@pytest.mark.parametrize(("name", "optimizer"), [("softmax", "sparse_adam"), ("network", "adamw"), ("source", "adam")])
def test_what_is_refused_does_blow_up_noise(name, optimizer):
    noise = normal(200 * ROWS // BATCH, BATCH, seed=1)
    weights = built(name)
    table = visit(
        weights,
        WEIGHT_OPTIMIZERS[optimizer](weights.parameters()),
        200,
        lambda step, rows: 3 * (1 + 1e-7 * noise[step]),
        EQUAL,
    )
    assert spread(table) > 1e-2


@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_of_one_row_is_refused(name):
    with pytest.raises(UserError, match=r"batch_size.*at least 2"):
        built(name).set_gradient(features_of(torch.tensor([3]), EQUAL), torch.ones(1).double())


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", LEARNED)
def test_a_step_without_scores_says_nothing_of_their_scale(name, nothing):
    """c and all that follows are those of a run without such steps, which come first, once or often, and in between."""
    rows, scores = torch.arange(2 * BATCH), normal(6, 2 * BATCH, seed=7)
    given = {}
    for first, between in ((0, 0), (1, 0), (4, 3)):
        weights = built(name)
        optimizer = ExponentiatedGradient(weights.parameters())
        empty = torch.full((2 * BATCH,), nothing, dtype=torch.float64)
        steps = [empty] * first + [s for score in scores for s in [score, *[empty] * between]]
        features = features_of(rows, GROUPS)
        weights.observe(features)
        for s_B in steps:
            weights.set_gradient(features, s_B)
            optimizer.step()
            optimizer.zero_grad()
            weights.after_step()
        given[first, between] = weights.updates[None]
        if weights.kl_to_prior == 0:  # whose pull needs no scores
            averages = torch.stack([weights.spread_average, weights.score_average])
            given[first, between] = torch.cat([weights.updates[None], averages, weights(features).double()])
    assert torch.equal(given[0, 0], given[1, 0])
    assert torch.equal(given[0, 0], given[4, 3])
    assert given[0, 0][0] == 6


def test_one_finite_score_has_nothing_to_be_compared_with():
    weights = built("softmax")
    s_B = torch.full((BATCH,), math.nan, dtype=torch.float64)
    s_B[3] = 1.0
    weights.set_gradient(features_of(torch.arange(BATCH), EQUAL), s_B)
    assert weights.updates == 0
    assert not weights.logits.grad.to_dense().any()


def test_rows_without_a_finite_score_do_not_shrink_the_scale():
    whole, broken = built("softmax"), built("softmax")
    s_B = normal(BATCH, seed=7)
    whole.set_gradient(features_of(torch.arange(BATCH), EQUAL), s_B)
    more_B = torch.cat([s_B, torch.full((BATCH,), math.nan, dtype=torch.float64)])
    broken.set_gradient(features_of(torch.arange(2 * BATCH), EQUAL), more_B)
    torch.testing.assert_close(broken.spread_average, whole.spread_average)
    torch.testing.assert_close(broken.logits.grad.to_dense(), whole.logits.grad.to_dense())


def test_softmax_steps_along_the_mirror_descent_of_the_whole_gradient():
    weights = built("softmax")
    with torch.no_grad():
        weights.logits.copy_(normal(ROWS, seed=1))
    weights.recount()
    s = normal(ROWS, seed=2).tanh()  # none so far out that it is cut
    p = weights.table() / ROWS
    weights.set_gradient(features_of(torch.arange(ROWS), EQUAL), s)
    coupled = p * (s - (p * s).sum())  # dF/dω of mean_i s_i·w_i
    mirrored = weights.logits.grad.to_dense() * p
    torch.testing.assert_close(mirrored / mirrored.norm(), coupled / coupled.norm())


# ---- settings ----


def test_a_floor_is_kept():
    weights = built("softmax+floor")
    visit(weights, ExponentiatedGradient(weights.parameters()), 40, lambda step, rows: GROUPS[rows], GROUPS)
    assert weights.table().min() == pytest.approx(0.1, abs=1e-6)


def test_a_cap_is_kept_at_the_end_of_an_epoch():
    weights = built("softmax+cap")
    scores = normal(ROWS, seed=4)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 30, lambda step, rows: scores[rows], EQUAL)
    assert table.max() == pytest.approx(3.0, rel=1e-12)
    assert (table > 3 - 1e-9).sum() > 2
    free = SoftmaxWeights()
    free.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    with torch.no_grad():
        free.logits.copy_(weights.logits)
    assert free.table().max() > 4


def test_a_gate_keeps_the_asked_share():
    weights = SoftmaxWeights(keep=0.25)
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    scores = normal(ROWS, seed=4)
    table = visit(weights, ExponentiatedGradient(weights.parameters()), 5, lambda step, rows: scores[rows], EQUAL)
    assert (table > 0).sum() == 16
    assert set(table.nonzero()[:, 0].tolist()) == set(scores.argsort()[:16].tolist())
    with torch.no_grad():  # a row that was gated out comes back when its score turns
        worst = int(scores.argmax())
        weights.logits[worst] = weights.logits.max()
    weights.recount()
    assert weights.table()[worst] > 0


def test_rows_that_come_twice_in_a_window_keep_the_sums_right():
    weights = built("softmax")
    rows = torch.tensor([3, 3, 5, 7])
    weights.set_gradient(features_of(rows, EQUAL), normal(4, seed=1))
    ExponentiatedGradient(weights.parameters()).step()
    weights.after_step()
    assert abs(weights(features_of(torch.arange(ROWS), EQUAL)).mean() - 1) < 1e-12


def test_a_floor_is_not_added_twice():
    earlier = torch.tensor([0.2, 0.3, 1.0, 2.5], dtype=torch.float64)
    weights = SoftmaxWeights(floor=0.1)
    weights.build(torch.zeros(4, dtype=torch.int64), torch.float64)
    weights.set_prior(3 * earlier)
    torch.testing.assert_close(weights.table(), earlier)
