"""`ClosingSweep`: scores at rest against closed forms, and when a run is swept."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.policies import ROWS, UPPER_WEIGHT, batches, direction_of, made, reference, tiny_policy
from support.problems import normal, ridge_problem
from support.refining import run

from lit_bilevel import (
    ClosingSweep,
    Implicit,
    Mixing,
    NetworkWeights,
    OneStep,
    Penalty,
    Phase,
    SoftmaxWeights,
    ValueFunction,
)
from lit_bilevel.callbacks import closing_sweep
from lit_bilevel.callbacks.passes import ask_rows
from lit_bilevel.errors import UserError
from lit_bilevel.policy.rest import RestingProblem

# ---- scores at rest ----


@pytest.mark.parametrize(("solver", "steps"), [(ValueFunction(), 3), (OneStep(), 3), (Penalty(), 1)])
def test_scores_at_rest_are_those_of_the_closed_form(solver, steps):
    """Of the state that some steps left: neither the state nor the scores change when they are asked for twice."""
    problem = ridge_problem(0.4)
    for _ in range(steps):
        solver(problem)
        problem.theta = problem.theta + 0.1 * normal(4, seed=steps)
    first, second = solver.scores_at_rest(problem), solver.scores_at_rest(problem)
    assert torch.equal(first, second)
    gamma = 0.6 / 0.4
    if isinstance(solver, ValueFunction):
        expected = gamma * (problem.lower_losses() - problem.lower_losses_at(solver._model.values))
    elif isinstance(solver, Penalty):
        expected = gamma * problem.lower_losses()
    else:
        mean = solver._running.average[0] / (1 - solver.direction_decay ** float(solver._running.gradients))
        expected = -problem.lower_jvp([mean])
    torch.testing.assert_close(first, expected)


def test_a_solver_that_has_not_begun_scores_nothing():
    problem = ridge_problem(0.4)
    for solver in (ValueFunction(), OneStep()):
        assert not solver.scores_at_rest(problem).any()
    for solver in (Mixing(), Implicit()):
        with pytest.raises(UserError, match="has no scores at rest; use `ValueFunction`"):
            solver.scores_at_rest(problem)


@pytest.mark.parametrize("solver", [ValueFunction(), OneStep(), Penalty()])
def test_rows_at_rest_are_scored_as_one_by_one(solver):
    """In float64: in one batch, row by row, and by the problem of a training step."""
    policy = tiny_policy().double()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-2)
    step = made(policy, optimizer=optimizer)
    solver(step)
    if isinstance(solver, ValueFunction):
        solver._model.values = [v + 0.1 * d for v, d in zip(solver._model.values, direction_of(policy), strict=True)]

    def rest(batch):
        return RestingProblem(policy, batch, UPPER_WEIGHT, optimizer, step.engine, step.lower_objective)

    whole = torch.cat([solver.scores_at_rest(rest(batch)) for batch in batches(1, ROWS)])
    alone = torch.cat([solver.scores_at_rest(rest(batch)) for batch in batches(1, 1)])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-9)
    assert whole.std() > 0
    at = solver._model.values if isinstance(solver, ValueFunction) else step.values()
    if not isinstance(solver, OneStep):
        plain, _ = reference(policy, 1)
        with policy.substituted(at):
            other, _ = reference(policy, 1)
        gamma = (1 - UPPER_WEIGHT) / UPPER_WEIGHT
        torch.testing.assert_close(whole, gamma * (plain - other if isinstance(solver, ValueFunction) else plain))


# ---- the sweep ----


LEARN = Phase("weights", 0.5, upper_weight=0.9, learning_rate=0.5)

TRAIN = Phase("policy", 0.5, upper_weight=0.25, learning_rate=1.0, learn_weights=False)


class Settled(Callback):
    """Steps after which weights were set, and from what."""

    def __init__(self, monkeypatch):
        self.steps, self.scores = [], []

        def scores(trainer, *given, upper_weight):
            self.steps.append((trainer.global_step, upper_weight))
            self.scores.append(ask_rows(trainer, *given, upper_weight=upper_weight))
            return self.scores[-1]

        monkeypatch.setattr(closing_sweep, "ask_rows", scores)


def test_the_sweep_is_at_the_end_of_its_phase_and_sets_the_weights(small, tmp_path, monkeypatch):
    settled = Settled(monkeypatch)
    weights = SoftmaxWeights()
    module = run(
        small,
        tmp_path,
        ClosingSweep("weights", strength=2.0),
        steps=8,
        weights=weights,
        solver=ValueFunction(),
        phases=[LEARN, TRAIN],
    )
    assert settled.steps == [(4, 0.9)]
    (score_N,) = settled.scores
    assert score_N.isfinite().all()
    centred = score_N - score_N.mean()
    expected = (-(centred / centred.abs().mean()).clamp(-3, 3) / 2.0).softmax(0) * 90
    torch.testing.assert_close(module.weights.table(), expected, rtol=1e-5, atol=1e-8)


def test_the_sweep_of_a_run_without_phases_is_at_its_end(small, tmp_path, monkeypatch):
    settled = Settled(monkeypatch)
    run(small, tmp_path, ClosingSweep(), steps=5, solver=OneStep())
    assert settled.steps == [(5, 0.5)]


def test_a_sweep_that_has_nothing_to_set_is_refused(small, tmp_path):
    phases = [LEARN, TRAIN]
    for callback, settings, message in (
        (ClosingSweep("policy"), {"phases": phases}, "the phase 'policy', in which the solver does not run"),
        (ClosingSweep("all"), {"phases": phases}, "there is no phase 'all' in `model.phases`; there are: weights"),
        (ClosingSweep(), {"weights": NetworkWeights()}, "`OneStep` with `NetworkWeights`; use `ValueFunction`"),
        (ClosingSweep(), {"solver": Mixing()}, "`Mixing` with `SoftmaxWeights`"),
    ):
        with pytest.raises(UserError, match=message):
            run(small, tmp_path, callback, steps=2, **settings)
    with pytest.raises(UserError, match="`strength` of `ClosingSweep` is 0"):
        ClosingSweep(strength=0)
