"""What solvers get under SFT and DPO at either level, against finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from support import ranks
from support.pairs import BETA, ROWS, adapted, by_hand, pairs
from support.problems import normal

from lit_bilevel import DPO, SFT, Implicit, Mixing, OneStep, ValueFunction
from lit_bilevel.data.collate import collate
from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.problem import PolicyProblem


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random GPT-NeoX, which keeps float64 throughout."""
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return str(folder)


ENGINE = Engine(backward=torch.Tensor.backward, unsynchronised=torch.enable_grad, average=lambda values: values)

LEVELS = {"upper": (SFT(), DPO(BETA)), "lower": (DPO(BETA), SFT()), "both": (DPO(BETA), DPO(1.0))}


def problem_of(policy: Policy, objectives, size: int = ROWS) -> PolicyProblem:
    policy.zero_grad()
    batches = {
        level: [collate(pairs(seed)[i : i + size], ROWS) for i in range(0, ROWS, size)]
        for level, seed in (("lower", 1), ("upper", 2))
    }
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    weight_N = normal(ROWS, seed=5).exp()
    return PolicyProblem(
        policy,
        batches["lower"],
        batches["upper"],
        lambda features: weight_N[features.row_B],
        False,
        0.3,
        optimizer,
        ENGINE,
        objectives,
    )


def flat(values) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values])


def moved_losses(policy: Policy, objective, seed: int, step: list[torch.Tensor]) -> torch.Tensor:
    """Losses of all rows of a level after a step of the adapter, by hand for pairs."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter, part in zip(other.trainable(), step, strict=True):
            parameter += part
        if isinstance(objective, DPO):
            return by_hand(other, pairs(seed), objective.beta)
        return other.losses(objective, collate(pairs(seed), ROWS))


@pytest.mark.parametrize("derivative", ["forward", "one_sided"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [ROWS, 4])
def test_one_step_scores_are_finite_differences(model, level, derivative, size):
    policy, epsilon = adapted(model), 1e-5
    lower, upper = LEVELS[level]
    problem = problem_of(policy, (lower, upper), size)
    scores = OneStep(derivative, None if derivative == "forward" else 1e-6, preconditioned=False, direction_decay=0.0)(
        problem
    )
    loss = policy.losses(upper, collate(pairs(2), ROWS)).mean()
    direction = torch.autograd.grad(loss, policy.trainable())
    steps = [[sign * epsilon * part for part in direction] for sign in (1, -1)]
    ahead_B, behind_B = (moved_losses(policy, lower, 1, step) for step in steps)
    expected_B = (behind_B - ahead_B) / (2 * epsilon)
    assert (scores - expected_B).abs().max() < 1e-5 * expected_B.abs().max()
    ahead, behind = (moved_losses(policy, upper, 2, step).mean() for step in steps)
    assert float((flat(direction) ** 2).sum()) == pytest.approx(float(ahead - behind) / (2 * epsilon), rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_hessian_vector_products_and_gradients_elsewhere(model, level):
    policy, epsilon = adapted(model), 1e-5
    lower, upper = LEVELS[level]
    problem = problem_of(policy, (lower, upper), 4)
    weight_B, vector = problem.weights(), [normal(*p.shape, seed=40 + i) for i, p in enumerate(policy.trainable())]

    def total_gradient(sign: int) -> torch.Tensor:
        values = [v + sign * epsilon * part for v, part in zip(problem.values(), vector, strict=True)]
        with policy.substituted(values):
            loss = 0.3 * policy.losses(upper, collate(pairs(2), ROWS)).mean()
            loss = loss + 0.7 * (weight_B * policy.losses(lower, collate(pairs(1), ROWS))).mean()
            return flat(torch.autograd.grad(loss, policy.trainable()))

    expected = (total_gradient(1) - total_gradient(-1)) / (2 * epsilon)
    product = flat(problem.hessian_vector_product(vector))
    assert (product - expected).abs().max() < 1e-5 * expected.abs().max()
    elsewhere = [value + part for value, part in zip(problem.values(), vector, strict=True)]
    loss_B, _ = problem.lower_gradient_at(elsewhere)
    assert (loss_B - moved_losses(policy, lower, 1, vector)).abs().max() < 1e-10


def test_the_reference_costs_one_pass_a_batch_and_step(model):
    calls: list[bool] = []
    for solver in (
        Mixing(),
        OneStep("one_sided"),
        OneStep("forward"),
        ValueFunction(),
        Implicit(iterations=2, damping=1.0),
    ):
        policy = adapted(model)
        off = policy.model.base_model.disable_adapter_layers
        policy.model.base_model.disable_adapter_layers = lambda off=off: (calls.append(True), off())
        problem = problem_of(policy, LEVELS["both"], 3)
        if solver.learns:
            solver(problem)
        problem.backward()
        assert len(calls) == 4  # two micro-batches at each level
        calls.clear()
