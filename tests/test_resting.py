"""Phases in which the policy rests: what moves and what is computed; the pool model is that beside a pass."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.refining import Logged, run

from lit_bilevel import (
    CleanProbability,
    ClosingSweep,
    CrossFit,
    OneStep,
    Phase,
    ScoredPrior,
    SigmoidWeights,
    ValueFunction,
)
from lit_bilevel.errors import UserError
from lit_bilevel.policy.policy import Policy

REST = Phase("pool", 0.5, learn_weights=False, prepare_solver=True, learning_rate=0)
TRAIN = Phase("policy", 0.5, upper_weight=0.25, learn_weights=False, learning_rate=1.0)


class Seen(Callback):
    """What every step of a run did."""

    def __init__(self, monkeypatch):
        self.moved, self.passes, self.optimized, self.steps = [], [], [], []
        self._passes = 0
        original = Policy.losses

        def losses(policy, *rest):
            self._passes += 1
            return original(policy, *rest)

        monkeypatch.setattr(Policy, "losses", losses)

    def on_train_batch_start(self, trainer, pl_module, *rest):
        self._before, self._passes = [p.detach().clone() for p in pl_module.policy.parameters()], 0

    def on_train_batch_end(self, trainer, pl_module, *rest):
        after = list(pl_module.policy.parameters())
        self.moved.append(not all(torch.equal(p, q) for p, q in zip(self._before, after, strict=True)))
        self.passes.append(self._passes)
        self.optimized.append(bool(trainer.optimizers[0].state))
        self.steps.append(trainer.global_step)


class Kept(Callback):
    """The pool model at the end of the phase, before it is let go."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step == 3:
            state = pl_module.solver.state_dict()
            models = [state] if "values" in state else list(state.values())
            self.values = [value.clone() for model in models for value in model["values"]]


def rested(small, folder, *watch, closing=ClosingSweep, **settings):
    settings = {"weights": SigmoidWeights(), "solver": ValueFunction(learning_rate=1e-3), **settings}
    return run(small, folder, closing(), watch=watch, steps=6, phases=[REST, TRAIN], **settings)


def test_nothing_but_the_pool_model_moves_and_a_step_is_one_pass(small, tmp_path, monkeypatch):
    seen, logged = Seen(monkeypatch), Logged()
    module = rested(small, tmp_path, logged, seen)
    assert seen.moved == [False] * 3 + [True] * 3
    assert seen.passes[:2] == [1, 1]  # of φ over the pool rows
    assert seen.passes[3:] == [2, 2, 2]  # after the sweep, of the policy over the rows of both levels
    assert seen.optimized == [False] * 3 + [True] * 3
    assert seen.steps == [1, 2, 3, 4, 5, 6]
    assert module.weights.table().std() > 0.1  # the sweep found φ ready
    losses = [step["lower/solver_loss"] for step in logged.steps[:3]]
    assert losses[0] > losses[-1]
    assert "upper/loss" not in logged.steps[2]


@pytest.mark.parametrize(("solver", "closing"), [(ValueFunction, ClosingSweep), (CrossFit, CleanProbability)])
def test_the_pool_model_is_what_it_is_beside_a_pass_of_the_policy(small, tmp_path, monkeypatch, solver, closing):
    """To the bit: a pass at a rate of 0, as loss scaling needs one, changes nothing that φ sees."""
    kept, beside = Kept(), Kept()
    first = rested(small, tmp_path / "a", ScoredPrior(), kept, closing=closing, solver=solver(learning_rate=1e-3))
    monkeypatch.setattr("lit_bilevel.module.rests", lambda module: False)
    second = rested(small, tmp_path / "b", ScoredPrior(), beside, closing=closing, solver=solver(learning_rate=1e-3))
    assert kept.values
    assert all(torch.equal(p, q) for p, q in zip(kept.values, beside.values, strict=True))
    assert torch.equal(first.weights.table(), second.weights.table())


def test_other_solvers_are_prepared_at_a_policy_that_rests(small, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    module = rested(small, tmp_path, seen, solver=OneStep())
    assert seen.moved == [False] * 3 + [True] * 3
    assert module.weights.table().std() > 0


def test_a_solver_that_is_prepared_for_nothing_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="the phase 'pool' has `prepare_solver`, and no later one learns weights; add"):
        run(small, tmp_path, Logged(), steps=2, solver=OneStep(), phases=[REST, TRAIN])
    with pytest.raises(UserError, match="so its learning rate is 0, which `ValueFunction` would take for its own"):
        run(small, tmp_path, ClosingSweep(), steps=2, solver=ValueFunction(), phases=[REST, TRAIN])
