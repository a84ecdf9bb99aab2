"""What a real policy answers to a solver, against plain autograd on a random two-layer transformer in float64."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from support.policies import (
    ENGINE,
    EVERY_SOLVER,
    ROWS,
    UPPER_WEIGHT,
    WEIGHTS,
    batches,
    direction_of,
    distance,
    flat,
    made,
    reference,
    replays_dropout,
    tiny_policy,
)

from lit_bilevel import BMOWeights, Implicit, Mixing, OneStep, Penalty, ValueFunction, losses
from lit_bilevel.errors import UserError
from lit_bilevel.policy import shard
from lit_bilevel.policy.compile import compile_layers
from lit_bilevel.policy.load import checkpoint_activations
from lit_bilevel.policy.policy import Policy
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
