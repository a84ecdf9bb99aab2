"""Every solver against a known answer (lit_bilevel/README.md 2.2)."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.problems import (
    SOLVERS,
    hypergradient,
    interpolating_problem,
    normal,
    planted_problem,
    ridge_problem,
    separable_problem,
    train,
)

from lit_bilevel import (
    Aligned,
    BMOWeights,
    Implicit,
    Mixing,
    OneStep,
    Penalty,
    SoftmaxWeights,
    UniformWeights,
    ValueFunction,
)
from lit_bilevel.errors import UserError
from lit_bilevel.solvers.pool_model import SKIPPED


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def sgd(values):
    return torch.optim.SGD(values, lr=1.0)


# ---- the hypergradient ----


@pytest.mark.parametrize("upper_weight", [0.0, 0.3])
@pytest.mark.parametrize("method", ["conjugate_gradient", "neumann"])
def test_implicit_is_the_hypergradient(upper_weight, method):
    problem = ridge_problem(upper_weight)
    solver = Implicit(method, iterations=2000, **({"tolerance": 1e-14} if method == "conjugate_gradient" else {}))
    assert distance(solver(problem), hypergradient(problem)) < 1e-8


def test_implicit_stops_at_negative_curvature():
    problem = ridge_problem(0.3)
    problem.hessian_vector_product = lambda vector: [-vector[0]]
    assert torch.isfinite(Implicit()(problem)).all()


def test_damping_is_added_to_the_hessian():
    problem = ridge_problem(0.3)
    x = torch.linalg.solve(problem.hessian() + 0.5 * torch.eye(4), problem.upper_gradient()[0])
    expected = -0.7 * problem.lower_jvp([x])
    assert distance(Implicit(damping=0.5)(problem), expected) < 1e-8


def test_error_of_the_value_function_halves_when_gamma_doubles():
    exact = hypergradient(ridge_problem(0.0))
    errors = []
    for doubling in range(5, 12):
        problem = ridge_problem(1 / (1 + 2.0**doubling))
        solver = ValueFunction(inner_steps=3000, optimizer=sgd)
        errors.append(distance(solver(problem), exact))
    ratios = [after / before for before, after in itertools.pairwise(errors)]
    assert len(ratios) >= 5
    assert all(0.45 < ratio < 0.55 for ratio in ratios), ratios


def per_example(problem) -> torch.Tensor:
    """−⟨∇f, ∇ℓ_i⟩ from one backward pass an example."""
    theta = problem.theta.clone().requires_grad_()
    (upper,) = torch.autograd.grad(problem.upper_loss_at(theta), theta)
    losses = problem.lower_losses_at([theta])
    return torch.stack([-upper @ torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses])


@pytest.mark.parametrize(("derivative", "tolerance"), [("one_sided", 1e-6), ("central", 1e-6), ("forward", 1e-10)])
def test_one_step_is_the_alignment_of_gradients(derivative, tolerance):
    problem = ridge_problem(0.0)
    solver = OneStep(derivative, None if derivative == "forward" else 1e-7, preconditioned=False, direction_decay=0.0)
    assert distance(solver(problem), per_example(problem)) < tolerance


def test_one_step_follows_the_preconditioned_direction():
    problem = ridge_problem(0.0)
    scale = normal(4, seed=20).exp()
    problem.precondition = lambda direction: [scale * direction[0]]
    expected = -problem.lower_jvp([scale * problem.upper_gradient()[0]])
    assert distance(OneStep("forward", direction_decay=0.0)(problem), expected) < 1e-12


@pytest.mark.parametrize("every", [1, 3])
def test_one_step_averages_its_direction(every):
    """A mean of all gradients so far, the newest weighted most: none counts more for having been the first."""
    problem, solver = ridge_problem(0.0), OneStep("forward", direction_decay=0.9, direction_every=every)
    start, gradients = problem.theta, []
    for step in range(8):
        problem.theta = start + step
        if step % every == 0:
            gradients.append(problem.upper_gradient()[0])
        share = torch.tensor([0.9**age for age in reversed(range(len(gradients)))], dtype=torch.float64)
        mean = (share[:, None] * torch.stack(gradients)).sum(0) / share.sum()
        assert distance(solver(problem), -problem.lower_jvp([mean])) < 1e-12


def test_aligned_responses_follow_the_running_direction_across_a_resume():
    """The same mean as that of `OneStep`; the gradient of one batch is mostly noise."""
    problem, rule = ridge_problem(0.0), Aligned(direction_decay=0.9, preconditioned=False)
    start, gradients = problem.theta, []
    for step in range(6):
        problem.theta = start + step
        gradients.append(problem.upper_gradient()[0])
        share = torch.tensor([0.9**age for age in reversed(range(len(gradients)))], dtype=torch.float64)
        mean = (share[:, None] * torch.stack(gradients)).sum(0) / share.sum()
        assert distance(rule.direction(problem)[0], mean) < 1e-12
        if step == 2:
            resumed = Aligned(direction_decay=0.9, preconditioned=False)
            resumed.load_state_dict(rule.state_dict())
            rule = resumed


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_an_overflowed_gradient_takes_no_part_in_the_direction(decay):
    problem, solver = ridge_problem(0.0), OneStep("forward", direction_decay=decay)
    gradient = problem.upper_gradient()
    overflowed = [gradient[0].clone()]
    overflowed[0][0] = torch.inf  # the largest entry; the others would point elsewhere
    problem.upper_gradient = lambda: overflowed
    assert torch.equal(solver(problem), torch.zeros(12).double())
    problem.upper_gradient = lambda: gradient
    first = solver(problem)
    assert distance(first, -problem.lower_jvp(gradient)) < 1e-12  # the one that overflowed is not counted either
    problem.upper_gradient = lambda: overflowed
    assert torch.equal(solver(problem), first)


def test_one_step_refuses_differences_without_digits():
    problem = ridge_problem(0.0)
    problem.differences = False
    with pytest.raises(UserError, match="forward"):
        OneStep("central")(problem)
    assert torch.isfinite(OneStep("auto")(problem)).all()


def test_one_step_at_a_zero_gradient():
    problem = ridge_problem(0.0)
    problem.upper = (problem.upper[0], problem.upper[0] @ problem.theta)
    for derivative in ("one_sided", "central", "forward"):  # weights count no step whose scores are exactly 0
        assert torch.equal(OneStep(derivative)(problem), torch.zeros(12).double())


def test_penalty_is_the_value_function_where_the_pool_can_be_fitted():
    problem = interpolating_problem()
    value_function = ValueFunction(inner_steps=5000, optimizer=sgd)
    assert distance(Penalty()(problem), value_function(problem)) < 1e-8


def test_penalty_is_something_else_where_it_cannot():
    problem = ridge_problem(0.2)
    assert distance(Penalty()(problem), ValueFunction(inner_steps=1000, optimizer=sgd)(problem)) > 0.1
    import lit_bilevel.solvers.penalty

    assert "another objective" in lit_bilevel.solvers.penalty.__doc__


# ---- the paper's statements ----


@pytest.mark.parametrize(
    ("name", "upper_weight"), [("one_step", 0.0), ("one_step", 0.3), ("implicit", 0.0), ("value_function", 0.1)]
)
def test_useless_rows_lose_their_weight(name, upper_weight):
    def selected(**settings):
        solver = ValueFunction(5, optimizer=sgd) if name == "value_function" else SOLVERS[name]()
        weights = SoftmaxWeights(**settings)
        problem = train(planted_problem(upper_weight), weights, solver, steps=1500, weight_lr=0.03)
        return problem.lower_losses()[:20].mean(), weights.table()

    mixed = train(planted_problem(upper_weight), UniformWeights(), Mixing(), steps=1500).lower_losses()[:20].mean()
    loss, table = selected(kl_to_prior=0.1)
    assert table[20:].max() < 1e-3
    assert table[:20].min() >= 1
    assert loss < 1e-3 * mixed
    loss, table = selected()  # without the pull to uniform, useful rows share their mass unevenly
    assert table[20:].max() < 1e-3
    assert table[:20].mean() >= 1
    assert loss < 1e-3 * mixed


def test_bmo_and_bds_reach_the_same_validation_loss():
    def f(problem):
        return float(problem.upper_loss_at(problem.theta))

    best = separable_problem(1.0)
    best.theta = torch.linalg.lstsq(best.upper[0], best.upper[1][:, None]).solution[:, 0]
    mixed = train(separable_problem(0.5), UniformWeights(), Mixing(), steps=3000)
    bds = train(separable_problem(0.5), SoftmaxWeights(), OneStep(direction_decay=0.0), steps=3000)
    bmo = train(separable_problem(0.5), BMOWeights(temperature=0.3), Mixing(), steps=3000)
    assert f(mixed) > f(best) + 0.01
    assert abs(f(bds) - f(best)) < 1e-6
    assert abs(f(bmo) - f(bds)) < 1e-6


# ---- habits of every solver ----


@pytest.mark.parametrize("name", SOLVERS)
def test_scores_are_one_number_an_example(name):
    problem = ridge_problem(0.3)
    scores = SOLVERS[name]()(problem)
    assert scores.shape == (12,)
    assert scores.dtype == torch.float64
    assert not scores.requires_grad
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_permuting_rows_permutes_scores(name):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    problem, permuted = ridge_problem(0.3), ridge_problem(0.3)
    permuted.lower = (problem.lower[0][order], problem.lower[1][order])
    permuted.weight_B = problem.weight_B[order]
    assert distance(SOLVERS[name]()(problem)[order], SOLVERS[name]()(permuted)) < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_a_resumed_solver_goes_on_bit_for_bit(name):
    problems = [ridge_problem(0.3) for _ in range(6)]
    for step, problem in enumerate(problems):
        problem.theta = problem.theta + step * normal(4, seed=30)
    whole, first, second = SOLVERS[name](), SOLVERS[name](), SOLVERS[name]()
    expected = [whole(problem) for problem in problems]
    for problem in problems[:3]:
        first(problem)
    second.load_state_dict(first.state_dict())
    first(problems[0])  # the old one goes on elsewhere and must not be shared with
    for problem, score in zip(problems[3:], expected[3:], strict=True):
        assert torch.equal(second(problem), score)


@pytest.mark.parametrize("name", ["penalty", "value_function"])
def test_lambda_zero_is_refused(name):
    assert SOLVERS[name]().needs_upper_weight
    with pytest.raises(UserError, match="upper_weight"):
        SOLVERS[name]()(ridge_problem(0.0))


def test_the_pool_model_survives_an_overflow():
    problem, solver = ridge_problem(0.3), ValueFunction()
    solver(problem)
    kept = [value.clone() for value in solver.state_dict()["values"]]
    broken = ridge_problem(0.3)
    broken.lower = (broken.lower[0], broken.lower[1] * torch.inf)
    for _ in range(SKIPPED - 1):
        solver(broken)
    with pytest.warns(UserWarning, match="10 steps of a pool model in a row were skipped"):
        solver(broken)
    solver(broken)  # it is told once: another warning would be an error
    assert all(torch.equal(x, y) for x, y in zip(kept, solver.state_dict()["values"], strict=True))


def test_the_value_function_has_no_scores_before_the_pool_model_moved():
    problem = ridge_problem(0.3)
    at_values = problem.lower_gradient_at

    def other_kernel(values, weighted):  # the same losses to the last few bits
        loss_B, gradient = at_values(values, weighted)
        return loss_B * (1 + 1e-12), gradient

    problem.lower_gradient_at = other_kernel
    solver = ValueFunction(optimizer=sgd)
    assert torch.equal(solver(problem), torch.zeros(12).double())
    assert solver(problem).abs().min() > 1e-6
    assert ValueFunction(2, optimizer=sgd)(problem).abs().min() > 1e-6
    resumed = ValueFunction(optimizer=sgd)
    resumed.load_state_dict(solver.state_dict())
    assert resumed(problem).abs().min() > 1e-6


def test_the_pool_model_steps_at_the_policy_learning_rate():
    problem, solver = ridge_problem(0.3), ValueFunction(optimizer=sgd)
    solver(problem)
    gradient = problem.lower_gradient_at(problem.values())[1][0]
    expected = problem.theta - problem.learning_rate * 0.7 * gradient
    assert distance(solver.state_dict()["values"][0], expected) < 1e-14


def test_the_pool_model_can_learn_the_pool_without_weights():
    """So what the weights already say does not keep the junk from φ, which has to know it to prefer it."""
    problem, solver = ridge_problem(0.3), ValueFunction(optimizer=sgd, weighted=False)
    solver(problem)
    plain = ridge_problem(0.3)
    plain.weight_B = torch.ones_like(plain.weight_B)
    expected = problem.theta - problem.learning_rate * 0.7 * plain.lower_gradient_at(plain.values())[1][0]
    assert distance(solver.state_dict()["values"][0], expected) < 1e-14
    weighted = ValueFunction(optimizer=sgd)
    weighted(problem)
    assert distance(solver.state_dict()["values"][0], weighted.state_dict()["values"][0]) > 1e-3


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ValueFunction(inner_steps=0), "inner_steps"),
        (lambda: Implicit(iterations=0), "iterations"),
        (lambda: Implicit(damping=-1), "damping"),
        (lambda: Implicit("neumann", step_size=0), "step_size"),
        (lambda: Implicit("lu"), "method"),
        (lambda: OneStep("backward"), "derivative"),
        (lambda: OneStep(direction_decay=1.0), "direction_decay"),
        (lambda: OneStep(epsilon=0), "epsilon"),
    ],
)
def test_bad_settings_are_named(make, word):
    with pytest.raises(UserError, match=word):
        make()
