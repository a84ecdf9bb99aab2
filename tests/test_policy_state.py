"""What solvers leave behind: the policy bit for bit, its gradient, and the dropout masks of the step."""

from __future__ import annotations

import pytest
import torch
from support.policies import (
    EVERY_SOLVER,
    ROWS,
    UPPER_WEIGHT,
    batches,
    direction_of,
    distance,
    flat,
    made,
    replays_dropout,
    tiny_policy,
)

from lit_bilevel import BMOWeights, Implicit, Mixing, OneStep, ValueFunction
from lit_bilevel.refinement.weighing import derivatives_along


def test_a_parameter_without_influence_has_zero_gradient():
    policy = tiny_policy()
    policy.register_parameter("unused", torch.nn.Parameter(torch.ones(3).double()))
    problem = made(policy)
    assert torch.isfinite(ValueFunction()(problem)).all()
    problem = made(policy)
    assert torch.isfinite(Implicit(iterations=2, damping=1.0)(problem)).all()
    problem.backward()
    assert torch.equal(policy.unused.grad, torch.zeros(3).double())


@pytest.mark.parametrize("solver", [OneStep, ValueFunction, lambda: Implicit(iterations=3, damping=1.0)])
def test_solvers_leave_the_policy_bit_for_bit_and_do_not_change_its_gradient(solver):
    policy = tiny_policy()
    before = [parameter.detach().clone() for parameter in policy.trainable()]
    plain = made(policy)
    plain.backward()
    expected = flat([parameter.grad for parameter in policy.trainable()])
    problem = made(policy)
    solver()(problem)
    problem.backward()
    assert all(torch.equal(x, y) for x, y in zip(before, policy.trainable(), strict=True))
    assert distance(flat([parameter.grad for parameter in policy.trainable()]), expected) < 1e-12


def test_substituted_values_go_away_also_on_exceptions():
    policy = tiny_policy()
    parameters = policy.trainable()
    before, places = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]

    def use(fail):
        with policy.substituted(direction_of(policy)):
            assert not torch.equal(parameters[0], before[0])
            if fail:
                raise RuntimeError("out of memory")

    use(False)
    with pytest.raises(RuntimeError, match="out of memory"):
        use(True)
    assert all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))
    assert places == [p.data_ptr() for p in parameters]


def test_an_exception_inside_a_solver_leaves_the_policy_alone(monkeypatch):
    policy = tiny_policy()
    before = [parameter.detach().clone() for parameter in policy.trainable()]
    problem = made(policy)
    problem.upper_gradient()
    problem.lower_losses()

    def fail(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy, "forward", fail)
    for solver in (OneStep(), ValueFunction()):
        with pytest.raises(RuntimeError, match="out of memory"):
            solver(problem)
    assert all(torch.equal(x, y) for x, y in zip(before, policy.trainable(), strict=True))


@pytest.mark.parametrize("upper_weight", [0.0, UPPER_WEIGHT])
@pytest.mark.parametrize("size", [ROWS, 3])
def test_dropout_is_replayed(size, upper_weight):
    replays_dropout(size, upper_weight)


def test_second_derivatives_see_the_masks_of_the_first():
    """H·v is the difference of the gradients that the same step takes."""
    policy, epsilon = tiny_policy(dropout=0.3), 1e-5
    problem, direction = made(policy), direction_of(policy)
    product = flat(problem.hessian_vector_product(direction))
    values = [value.clone() for value in problem.values()]
    gradients = []
    for sign in (1, -1):
        problem._upper_gradient = problem.upper_loss = None  # asked for anew, at the other values
        with policy.substituted([v + sign * epsilon * d for v, d in zip(values, direction, strict=True)]):
            upper, (_, lower) = flat(problem.upper_gradient()), problem.lower_gradient_at(problem.values())
        gradients.append(UPPER_WEIGHT * upper + (1 - UPPER_WEIGHT) * flat(lower))
    difference = (gradients[0] - gradients[1]) / (2 * epsilon)
    assert distance(product, difference) < 1e-6 * difference.abs().max()


@pytest.mark.parametrize("size", [ROWS, 3])
def test_passes_over_other_rows_leave_the_masks_of_the_step_alone(size):
    policy, found = tiny_policy(dropout=0.3), []
    for other in (False, True):
        torch.manual_seed(5)
        problem = made(policy, size)
        problem.lower_losses()
        if other:
            derivatives_along(problem, batches(3, 2), direction_of(policy))
        problem.backward()
        found.append(problem.lower_losses())
    assert distance(*found) < 1e-12
    problem = made(policy, size, 0.0)
    derivatives_along(problem, batches(3, 2), direction_of(policy))
    before = torch.get_rng_state()
    problem.lower_losses()  # draws for itself, though other rows came first
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("upper_weight", [0.0, UPPER_WEIGHT])
@pytest.mark.parametrize("size", [ROWS, 3])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_every_step_draws_masks_of_its_own(solver, size, upper_weight):
    """Three steps at equal values; training sees the same masks whatever a solver asks for, and none a second time."""
    if solver in ("penalty", "value_function") and upper_weight == 0:
        pytest.skip("the solver has no meaning at λ = 0")
    policy, gradients = tiny_policy(dropout=0.3), []
    torch.manual_seed(5)
    for _ in range(3):
        problem = made(policy, size, upper_weight)
        problem.upper_gradient()
        problem.lower_losses()
    drawn = torch.get_rng_state()
    for used in (Mixing(), EVERY_SOLVER[solver]()):
        torch.manual_seed(5)
        for _ in range(3):
            problem = made(policy, size, upper_weight)
            problem.upper_gradient()
            used(problem)
            problem.backward()
            gradients.append(flat([parameter.grad for parameter in policy.trainable()]))
        assert torch.equal(torch.get_rng_state(), drawn)
    mixing, asked = gradients[:3], gradients[3:]
    assert all(distance(a, b) < 1e-12 for a, b in zip(mixing, asked, strict=True))
    assert min(distance(asked[i], asked[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_weights_that_need_losses_do_not_depend_on_accumulation():
    gradients, weights = [], BMOWeights()
    weights.build(torch.zeros(ROWS, dtype=torch.int64), torch.float64)
    for step in range(2):  # the first window, in which rows weigh 1, and the one after it
        for size in (ROWS, 4):
            policy = tiny_policy()
            problem = made(policy, size, weigh=weights, needs_loss=True)
            problem.backward()
            gradients.append(flat([parameter.grad for parameter in policy.trainable()]))
        assert distance(gradients[-2], gradients[-1]) < 1e-12
        if step == 0:
            weights.observe(batches(1, ROWS)[0].features.with_loss(problem.lower_losses()))
    assert distance(gradients[0], gradients[2]) > 1e-3
