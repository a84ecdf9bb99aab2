"""What a real policy answers to a solver, against plain autograd on a random two-layer transformer in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.policies import (
    ENGINE,
    ROWS,
    UPPER_WEIGHT,
    WEIGHTS,
    direction_of,
    distance,
    flat,
    made,
    reference,
    replays_dropout,
    tiny_policy,
)

from lit_bilevel import OneStep, losses
from lit_bilevel.errors import UserError
from lit_bilevel.refinement.weighing import derivatives_along


@pytest.mark.parametrize("size", [ROWS, 3])
def test_losses_and_gradients(size):
    policy = tiny_policy()
    f_B, upper = reference(policy, 2)
    loss_B, lower = reference(policy, 1)
    problem = made(policy, size)
    assert distance(flat(problem.upper_gradient()), upper.mean(0)) < 1e-12
    assert distance(problem.lower_losses(), loss_B) < 1e-12
    assert distance(problem.upper_loss, f_B.mean()) < 1e-12
    at, gradient = problem.lower_gradient_at(problem.values())
    weighted = (WEIGHTS[:, None] * lower).mean(0)
    assert distance(at, loss_B) < 1e-12
    assert distance(flat(gradient), weighted) < 1e-12
    assert distance(flat(problem.lower_gradient_at(problem.values(), weighted=False)[1]), lower.mean(0)) < 1e-12
    problem.backward()
    left = flat([parameter.grad for parameter in policy.trainable()])
    assert distance(left, UPPER_WEIGHT * upper.mean(0) + (1 - UPPER_WEIGHT) * weighted) < 1e-12


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("upper_weight", [0.0, 0.3, 1.0])
def test_the_policy_gradient_does_not_depend_on_what_was_asked(asked, upper_weight):
    policy = tiny_policy()
    upper, lower = reference(policy, 2)[1], reference(policy, 1)[1]
    problem = made(policy, 3, upper_weight)
    if asked:
        problem.upper_gradient()
    problem.backward()
    problem.backward()  # once is enough
    left = flat([parameter.grad for parameter in policy.trainable()])
    expected = upper_weight * upper.mean(0) + (1 - upper_weight) * (WEIGHTS[:, None] * lower).mean(0)
    assert distance(left, expected) < 1e-12


@pytest.mark.parametrize(("derivative", "tolerance"), [("one_sided", 1e-6), ("central", 1e-6), ("forward", 1e-10)])
@pytest.mark.parametrize("size", [ROWS, 3])
def test_one_step_is_the_alignment_of_gradients(derivative, tolerance, size):
    policy = tiny_policy()
    upper, lower = reference(policy, 2)[1].mean(0), reference(policy, 1)[1]
    solver = OneStep(derivative, None if derivative == "forward" else 1e-7, preconditioned=False, direction_decay=0.0)
    scores = solver(made(policy, size))
    assert distance(scores, -lower @ upper) < tolerance


def test_alignments_of_responses_are_exact_in_double_precision():
    """Also in a model that normalises in float32 all the same, where differences of 1e-6 are noise."""
    policy = tiny_policy(rounding=True)
    upper, lower = reference(policy, 2)[1].mean(0), reference(policy, 1)[1]
    problem = made(policy)
    alignment_R = derivatives_along(problem, problem.lower, problem.upper_gradient())
    assert distance(alignment_R, lower @ upper) < 1e-5 * float((lower @ upper).abs().max())


@pytest.mark.parametrize("steps", [0, 3])
def test_one_step_preconditioned_by_the_next_step_of_the_policy_optimizer(steps):
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    for _ in range(steps):
        made(policy, optimizer=optimizer).backward()
        optimizer.step()
    upper, lower = reference(policy, 2)[1].mean(0), reference(policy, 1)[1]
    past = flat([optimizer.state[p]["exp_avg_sq"] for p in policy.trainable()]) if steps else torch.zeros_like(upper)
    second = (0.999 * past + 0.001 * upper**2) / (1 - 0.999 ** (steps + 1))
    scores = OneStep("forward", direction_decay=0.0)(made(policy, optimizer=optimizer))
    expected = -lower @ (upper / (second.sqrt() + 1e-8))
    assert distance(scores, expected) < 1e-9 * expected.abs().max()


def test_an_optimizer_without_second_moments_is_refused():
    policy = tiny_policy()
    problem = made(policy, optimizer=torch.optim.SGD(policy.trainable(), lr=0.1))
    with pytest.raises(UserError, match="`SGD` keeps no second moments"):
        OneStep("forward")(problem)


def test_an_optimizer_with_other_moments_is_refused():
    policy = tiny_policy()
    optimizer = torch.optim.Adamax(policy.trainable())
    for parameter in policy.trainable():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(UserError, match="`Adamax` keeps no second moments as Adam does"):
        OneStep("forward")(made(policy, optimizer=optimizer))


def test_a_scaled_loss_changes_no_answer():
    policy, found = tiny_policy(), []
    direction = direction_of(policy)
    for scale in (1.0, 1024.0):
        problem = made(policy, 3)
        engine = replace(ENGINE, loss_scale=scale, backward=lambda loss, scale=scale: (loss * scale).backward())
        problem.engine = engine
        upper, (_, gradient) = flat(problem.upper_gradient()), problem.lower_gradient_at(problem.values())
        product = flat(problem.hessian_vector_product(direction))
        found.append([upper, flat(gradient), problem.lower_jvp(direction), product])
        problem.backward()
        found[-1].append(flat([parameter.grad / scale for parameter in policy.trainable()]))
        assert torch.equal(problem.lower_jvp([0 * part for part in direction]), torch.zeros(ROWS).double())
    for plain, scaled in zip(*found, strict=True):
        assert distance(plain, scaled) < 1e-12 * plain.abs().max()


def test_lower_jvp_is_exact():
    policy = tiny_policy()
    lower, direction = reference(policy, 1)[1], direction_of(policy)
    assert distance(made(policy, 3).lower_jvp(direction), lower @ flat(direction)) < 1e-10


def test_hessian_vector_product_is_the_difference_of_gradients():
    policy, epsilon = tiny_policy(), 1e-5
    direction = direction_of(policy)
    problem = made(policy, 3)
    product = flat(problem.hessian_vector_product(direction))
    values = [value.clone() for value in problem.values()]
    gradients = []
    for sign in (1, -1):
        moved = [value + sign * epsilon * part for value, part in zip(values, direction, strict=True)]
        with policy.substituted(moved):
            upper, lower = reference(policy, 2)[1], reference(policy, 1)[1]
        gradients.append(UPPER_WEIGHT * upper.mean(0) + (1 - UPPER_WEIGHT) * (WEIGHTS[:, None] * lower).mean(0))
    difference = (gradients[0] - gradients[1]) / (2 * epsilon)
    assert distance(product, difference) < 1e-6 * difference.abs().max()


@pytest.mark.parametrize(
    "check",
    [
        partial(test_losses_and_gradients, 3),
        partial(test_one_step_is_the_alignment_of_gradients, "one_sided", 1e-6, ROWS),
        partial(test_one_step_is_the_alignment_of_gradients, "forward", 1e-10, ROWS),
        test_hessian_vector_product_is_the_difference_of_gradients,
        partial(replays_dropout, ROWS, UPPER_WEIGHT),
    ],
)
def test_the_answers_are_the_same_where_logits_come_in_chunks(check, monkeypatch):
    chunks = []
    apply = losses._ChunkedNLL.apply
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 40 * 7)
    monkeypatch.setattr(losses._ChunkedNLL, "apply", lambda *arguments: chunks.append(1) or apply(*arguments))
    check()
    assert chunks
