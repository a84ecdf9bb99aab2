"""`CrossFit` and `CleanProbability`: which rows a model learned, what its losses mean, and what the weights become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.policies import ENGINE, ROWS, batches, made, tiny_policy
from support.refining import Logged, run

from lit_bilevel import (
    SFT,
    CleanProbability,
    CrossFit,
    Mixing,
    OneStep,
    Phase,
    ScoredPrior,
    SigmoidWeights,
    ValueFunction,
)
from lit_bilevel.callbacks import clean_probability
from lit_bilevel.callbacks.clean_probability import clean_rows
from lit_bilevel.data.folds import fold_of, split_folds
from lit_bilevel.errors import UserError
from lit_bilevel.policy.rest import RestingProblem
from lit_bilevel.scores.presence import presence
from lit_bilevel.types import PADDING_ROW, Example

REST = Phase("pool", 0.5, learn_weights=False, prepare_solver=True, learning_rate=0)
TRAIN = Phase("policy", 0.5, upper_weight=0.25, learn_weights=False, learning_rate=1.0)


# ---- folds ----


def test_rows_are_dealt_out_by_a_hash_and_padding_fills_what_is_empty():
    folds = np.array([fold_of(row, 2) for row in range(10_000)])
    assert abs(folds.mean() - 0.5) < 0.01
    for step in (2, 3, 4, 8):  # a file may go through kinds of rows in turn
        assert abs(folds[::step].mean() - 0.5) < 0.05
        assert abs((folds[step:] == folds[:-step]).mean() - 0.5) < 0.05
    examples = [Example(row, 0, [1] * (5 + row), 2) for row in range(40) if fold_of(row, 2) == 0][:3]
    (own, other), (whole,) = split_folds(examples, 2), split_folds(examples, 1)
    assert own == examples == whole
    assert [example.row for example in other] == [PADDING_ROW]


# ---- the models ----


def two_folds(policy, optimizer):
    problem = made(policy, ROWS // 2, optimizer=optimizer)
    assert len(problem.lower) == 2
    return problem


def test_each_model_learns_the_other_fold_and_is_asked_of_its_own():
    """Model k is a `ValueFunction` that was shown the other fold alone, and what a row of fold k is asked of."""
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    solver = CrossFit(1e-2)
    alone = [ValueFunction(learning_rate=1e-2, weighted=False) for _ in range(2)]
    for _ in range(3):
        solver.prepare(two_folds(policy, optimizer))
        for number, model in enumerate(alone):
            problem = two_folds(policy, optimizer)
            model.prepare(problem.at_rows([problem.lower[1 - number]]))
    for number, batch in enumerate(batches(1, ROWS // 2)):
        rest = RestingProblem(policy, batch, 0.5, optimizer, ENGINE, SFT())
        held = solver.losses_at_rest(rest, number)
        assert torch.equal(held, rest.lower_losses_at(alone[number]._model.values))
        assert (held - rest.lower_losses_at(alone[1 - number]._model.values)).abs().min() > 1e-3


def test_a_continued_run_has_both_models():
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    first, second = CrossFit(1e-2), CrossFit(1e-2)
    first.prepare(two_folds(policy, optimizer))
    second.load_state_dict(first.state_dict())
    for solver in (first, second):
        solver.prepare(two_folds(policy, optimizer))
    for one, other in zip(first._models, second._models, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.values, other.values, strict=True))
    first.release()
    assert first.state_dict() == {}


# ---- who is clean ----


@pytest.mark.parametrize("good_is", ["learned", "not learned"])
def test_trusted_rows_tell_what_a_loss_under_the_pool_model_means(good_is):
    """30 % of the rows are bad; the pool model finds them hard, or easy. The prior says little."""
    random = np.random.default_rng(0)
    bad_N = random.random(800) < 0.3
    sign = 1 if good_is == "learned" else -1

    def scores(bad):
        return {
            "prior": random.normal(size=len(bad)) - 0.3 * bad,
            "policy": random.normal(size=len(bad)),
            "pool_model": random.normal(size=len(bad)) - sign * 1.5 * bad,
        }

    found = clean_rows(scores(bad_N), scores(np.zeros(120, dtype=bool)))
    assert found.slopes[2] * sign > 0.5
    w_N = found.probability_N
    assert (w_N[~bad_N][:, None] > w_N[bad_N]).mean() > 0.8  # the AUROC


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_share_of_clean_rows_and_their_probabilities_are_found(share):
    """Two normal distributions, two standard deviations apart, whose posterior is a logistic function."""
    random = np.random.default_rng(1)
    clean_N = random.random(20_000) < share
    pool_N, trusted_M = random.normal(size=20_000) + 2 * clean_N, random.normal(size=2_000) + 2
    found = presence(pool_N[:, None] / 1.4, trusted_M[:, None] / 1.4)
    assert found.share == pytest.approx(share, abs=0.06)
    assert found.least - 0.051 <= share <= found.most + 0.051  # one step of the grid
    assert found.most - found.least < 0.2
    exact_N = 1 / (1 + (1 - share) / share * np.exp(2 - 2 * pool_N))
    assert abs(found.probability_N - exact_N).mean() < 0.05
    assert found.probability_N.mean() == pytest.approx(share, abs=0.06)


def test_a_large_pool_is_fitted_on_in_part_and_told_whole(monkeypatch):
    random = np.random.default_rng(2)
    pool_NF, trusted_MF = random.normal(size=(3000, 2)), random.normal(size=(200, 2)) + 0.5
    whole = presence(pool_NF, trusted_MF)
    monkeypatch.setattr("lit_bilevel.scores.presence.MOST", 1500)
    part = presence(pool_NF, trusted_MF)
    assert len(part.probability_N) == 3000
    assert 0 < abs(part.probability_N - whole.probability_N).max() < 0.2


def test_scores_that_say_nothing_leave_the_weights_equal():
    random = np.random.default_rng(3)
    for _ in range(5):  # the likeliest share alone is near 0 in some of them
        found = presence(random.normal(size=(600, 3)), random.normal(size=(80, 3)))
        assert (found.least, found.most) <= (0.15, 1.0)  # and nothing is known of the share
        assert found.most - found.least > 0.7
        size = found.probability_N.sum() ** 2 / (found.probability_N**2).sum()
        assert size > 0.9 * 600
    found = presence(random.normal(size=(2000, 2)), random.normal(size=(400, 2)))
    assert found.probability_N.std() / found.probability_N.mean() < 0.15


# ---- in a run ----


def closed(small, folder, *watch, **settings):
    settings = {"weights": SigmoidWeights(), "solver": CrossFit(), "phases": [REST, TRAIN], **settings}
    return run(small, folder, ScoredPrior(), watch=[*watch], steps=8, **settings)


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_the_weights_are_powers_of_probabilities(small, tmp_path, monkeypatch, caplog, sharpness):
    seen = []

    def watched(*both):
        seen.append((both, clean_rows(*both)))
        return seen[-1][1]

    monkeypatch.setattr(clean_probability, "clean_rows", watched)
    module = closed(small, tmp_path, CleanProbability(sharpness=sharpness))
    (((pool, trusted), found),) = seen
    assert list(pool) == list(trusted) == ["prior", "policy", "pool_model"]
    assert all(len(values) == 90 for values in pool.values())
    assert all(len(values) == 24 and np.isfinite(values).all() for values in trusted.values())
    power_N = found.probability_N**sharpness
    expected = torch.from_numpy(power_N / power_N.mean())
    left = (power_N * (1 - found.probability_N)).sum() / power_N.sum()
    said = f"; the others are left about {left:.0%} of the weight"
    assert (said in caplog.text) == (found.most - found.least <= clean_probability.KNOWN)
    assert f"pool rows ({found.least:.0%} to {found.most:.0%}) are like the 24 trusted ones" in caplog.text
    torch.testing.assert_close(module.weights.table(), expected, rtol=1e-5, atol=1e-8)
    assert not np.array_equal(pool["policy"], pool["pool_model"])


def test_a_ratio_that_cannot_be_taken_is_refused(small, tmp_path):
    learn = Phase("weights", 0.5)
    cases = [
        ([CleanProbability()], {"solver": ValueFunction(learning_rate=1e-3)}, "needs the solver `CrossFit`"),
        ([CleanProbability()], {"phases": [learn, TRAIN]}, "has no scores in a step, and the phase 'weights'"),
        ([CleanProbability("policy")], {}, "the phase 'policy', in which the solver does not run"),
        ([CleanProbability()], {"solver": Mixing()}, "needs the solver `CrossFit`"),
        ([Logged()], {}, "add the callback `CleanProbability` to"),
    ]
    for watch, settings, message in cases:
        with pytest.raises(UserError, match=message):
            closed(small, tmp_path, *watch, **settings)
    with pytest.raises(UserError, match="`sharpness` of `CleanProbability` is -1"):
        CleanProbability(sharpness=-1)
    with pytest.raises(UserError, match="it needs the callback `ScoredPrior`"):
        run(small, tmp_path, CleanProbability(), steps=2, solver=CrossFit(), phases=[REST, TRAIN])
    with pytest.raises(UserError, match="has no pool model that did not learn a row; use `CrossFit`"):
        OneStep().losses_at_rest(made(tiny_policy()), 0)
