"""Passes of a step: how many there are, and that checkpointing and compiling change no answer."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from support.policies import ENGINE, EVERY_SOLVER, ROWS, distance, flat, made, tiny_policy

from lit_bilevel import BMOWeights, Mixing, OneStep, Penalty, ValueFunction
from lit_bilevel.policy import shard
from lit_bilevel.policy.compile import compile_layers
from lit_bilevel.policy.load import checkpoint_activations
from lit_bilevel.policy.policy import Policy


def checkpointed_policy(dropout: float = 0.0) -> Policy:
    """A policy that computes its layers again in the backward pass."""
    policy = tiny_policy(dropout)
    checkpoint_activations(policy.model)
    assert all(layer.gradient_checkpointing for layer in policy.layers())
    return policy


def compiled_policy(dropout: float = 0.0, backend: str = "inductor") -> Policy:
    """A policy with compiled layers."""
    policy = tiny_policy(dropout)
    names = [name for name, _ in policy.named_parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        compile_layers(policy, on_cpu=True)
    assert [name for name, _ in policy.named_parameters()] == names
    return policy


def same_answers(policy: Policy, solver: str, size: int, tolerance: float) -> None:
    """Scores and gradients of this policy equal those of a plain one."""
    found = []
    for one in (policy, tiny_policy()):
        problem = made(one, size)
        score_B = EVERY_SOLVER[solver]()(problem)
        problem.backward()
        found.append((score_B, flat([parameter.grad for parameter in one.trainable()])))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < tolerance * b.abs().max()


@pytest.mark.parametrize("size", [ROWS, 3])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_activation_checkpointing_changes_no_answer(solver, size):
    same_answers(checkpointed_policy(), solver, size, 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_compiling_changes_no_answer(solver):
    same_answers(compiled_policy(), solver, ROWS, 1e-7)


@pytest.mark.parametrize(
    ("solver", "weights", "passes", "backward"),
    [
        (Mixing, None, 2, 2),
        (Penalty, None, 2, 2),
        (Mixing, BMOWeights, 2, 2),
        (partial(OneStep, "one_sided"), None, 3, 2),
        (partial(OneStep, "forward"), None, 3, 2),
        (ValueFunction, None, 3, 2),  # and φ's backward pass, which leaves the policy's gradients alone
    ],
)
def test_passes_of_a_step(solver, weights, passes, backward):
    policy, made_weights = tiny_policy(), None
    if weights is not None:
        made_weights = weights()
        made_weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    calls, losses_seen = [], []
    policy.model.model.register_forward_hook(lambda *_: calls.append(1))
    problem = made(policy, weigh=made_weights, needs_loss=weights is not None)
    problem.engine = replace(ENGINE, backward=lambda loss: losses_seen.append(1) or loss.backward())
    used = solver()
    if used.learns:
        used(problem)
    problem.backward()
    problem.weights()
    assert len(calls) == passes
    assert len(losses_seen) == backward


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("solver", ["one_sided", "forward", "implicit"])
def test_passes_that_cannot_be_compiled_run_as_written(solver):
    same_answers(compiled_policy(backend="aot_eager"), solver, ROWS, 1e-7)


def test_forward_mode_says_nothing_of_what_torch_is_written_in(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._decomp.decompositions_for_jvp", raising=False)
    monkeypatch.delattr(torch._decomp, "decompositions_for_jvp", raising=False)
    shard._load_rules.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        problem = made(tiny_policy())
        problem.lower_jvp([torch.ones_like(value) for value in problem.values()])
    assert "torch._decomp.decompositions_for_jvp" in sys.modules
    assert not [str(warning.message) for warning in told if "jit" in str(warning.message)]
