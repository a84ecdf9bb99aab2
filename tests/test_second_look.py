"""`SecondLook`: what is told by what a policy has learned, when it is asked, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.refining import Logged, refine_all, run

from lit_bilevel import CleanProbability, CrossFit, Phase, ScoredPrior, SecondLook, SigmoidWeights
from lit_bilevel.callbacks import second_look
from lit_bilevel.errors import UserError
from lit_bilevel.scores.learned import LIMIT, Learned, learned_since

REST = Phase("pool", 0.25, learn_weights=False, prepare_solver=True, learning_rate=0)
TRAIN = Phase("policy", 0.75, upper_weight=0.25, learn_weights=False, learning_rate=1.0)


def pool(rows=2000, share=0.7, shift=2.0, told=1.0, seed=0):
    """Rows of which a share is clean, how likely that was said to be, their difficulty, and the policy's −ℓ now."""
    random = np.random.default_rng(seed)
    clean_N = random.random(rows) < share
    odds_N = np.log(share / (1 - share)) + told * (random.normal(size=rows) + told * np.where(clean_N, 0.5, -0.5))
    before_N = random.normal(size=rows)
    now_N = shift * clean_N + before_N + 0.7 * random.normal(size=rows)
    return clean_N, 1 / (1 + np.exp(-odds_N)), (now_N - now_N.mean()) / now_N.std(), before_N


def auroc(clean_N, values_N):
    return (values_N[clean_N][:, None] > values_N[~clean_N]).mean()


@pytest.mark.parametrize("share", [0.4, 0.7, 0.9])
def test_what_was_learned_tells_clean_rows(share):
    clean_N, p_N, now_N, before_N = pool(share=share)
    found = learned_since(p_N, now_N, before_N)
    assert found.shift > 0.5
    assert auroc(clean_N, found.probability_N) > max(0.93, auroc(clean_N, p_N) + 0.1)
    assert found.probability_N.mean() == pytest.approx(share, abs=0.05)
    odds_N = np.log(found.probability_N / (1 - found.probability_N)) - np.log(p_N / (1 - p_N))
    assert LIMIT - 0.01 < abs(odds_N).max() <= LIMIT + 1e-6
    # calibrated: of the rows with a probability near 0.8, as many are clean
    near_N = abs(found.probability_N - 0.8) < 0.1
    assert clean_N[near_N].mean() == pytest.approx(0.8, abs=0.15)


def test_rows_are_compared_with_others_that_were_as_hard_before():
    clean_N, p_N, now_N, before_N = pool(shift=1.0)
    equal_N = np.zeros_like(before_N)
    with_N, without_N = (learned_since(p_N, now_N, b).probability_N for b in (before_N, equal_N))
    assert auroc(clean_N, with_N) > auroc(clean_N, without_N) + 0.03


@pytest.mark.parametrize(
    "settings", [{"shift": 0.0}, {"shift": -2.0}, {"told": 0.0}, {"told": 0.0, "share": 0.999, "seed": 3}]
)
def test_nothing_moves_where_losses_do_not_rise_with_probabilities(settings):
    """Nothing was learned of the rows, or the opposite; or nothing was known of them before."""
    _, p_N, now_N, before_N = pool(**settings)
    found = learned_since(p_N, now_N, before_N)
    assert found.shift == 0
    assert np.array_equal(found.probability_N, p_N)


# ---- in a run ----


def looked(small, folder, *callbacks, **settings):
    settings = {"weights": SigmoidWeights(), "solver": CrossFit(), "phases": [REST, TRAIN], **settings}
    return run(small, folder, ScoredPrior(), watch=[CleanProbability(), *callbacks], steps=8, **settings)


@pytest.fixture
def seen(monkeypatch):
    """What was known and asked, and the weights before; the rows with odd numbers turn out to be clean."""
    calls = []

    def told(probability_N, now_N, before_N):
        calls.append((probability_N, now_N, before_N))
        return Learned(np.where(np.arange(len(now_N)) % 2, 0.9, 0.3), 1.0)

    monkeypatch.setattr(second_look, "learned_since", told)
    return calls


@pytest.mark.parametrize("refined", [False, True])
def test_the_policy_is_asked_within_its_phase_and_sets_the_weights(small, tmp_path, seen, caplog, refined):
    clean, logged = CleanProbability(sharpness=2.0), Logged()
    settings = {"weights": SigmoidWeights(), "solver": CrossFit(), "phases": [REST, TRAIN]}
    look = SecondLook(after=0.5)
    steps = []
    close = look.close
    look.close = lambda trainer, *rest: (steps.append(trainer.global_step), close(trainer, *rest))
    others = [refine_all(start=3)] if refined else []
    module = run(small, tmp_path, ScoredPrior(), watch=[clean, look, logged, *others], steps=8, **settings)
    ((known_N, now_N, before_N),) = seen
    assert steps == [5]  # two steps of rest, and half of six
    assert np.array_equal(known_N, clean.probability_N)
    assert len(now_N) == len(before_N) == 90
    assert abs(np.corrcoef(now_N, before_N)[0, 1]) < 1 - 1e-6  # the policy has moved
    expected = torch.tensor([0.3**2, 0.9**2] * 45)
    torch.testing.assert_close(module.weights.table(), (expected / expected.mean()).double(), rtol=1e-5, atol=1e-8)
    assert "by what the policy has learned since (shift +1.00)" in caplog.text


def test_weights_stay_where_nothing_was_told(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(second_look, "learned_since", lambda p_N, *others: learned_since(p_N, 0 * p_N, 0 * p_N))
    clean = CleanProbability()
    settings = {"weights": SigmoidWeights(), "solver": CrossFit(), "phases": [REST, TRAIN]}
    module = run(small, tmp_path, ScoredPrior(), watch=[clean, SecondLook()], steps=8, **settings)
    expected = torch.from_numpy(clean.probability_N / clean.probability_N.mean())
    torch.testing.assert_close(module.weights.table(), expected, rtol=1e-5, atol=1e-8)
    assert "does not tell clean rows from others, so the weights stay" in caplog.text


def test_a_look_that_cannot_be_taken_is_refused(small, tmp_path):
    for after in (0.0, 1.0):
        with pytest.raises(UserError, match="`after` of `SecondLook`"):
            SecondLook(after=after)
    with pytest.raises(UserError, match="is not after that of `CleanProbability`"):
        looked(small, tmp_path, SecondLook("pool"))
    with pytest.raises(UserError, match="there is no phase 'typo'"):
        looked(small, tmp_path, SecondLook("typo"))
    with pytest.raises(UserError, match="goes on from the callback `CleanProbability`"):
        run(small, tmp_path, ScoredPrior(), watch=[SecondLook()], solver=CrossFit(), phases=[REST, TRAIN])
