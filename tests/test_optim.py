"""Weight optimizers: the mirror step, and which combinations are refused."""

from __future__ import annotations

import pytest
import torch
from support.problems import WEIGHT_OPTIMIZERS, WEIGHTINGS, normal

from lit_bilevel import ExponentiatedGradient
from lit_bilevel.errors import UserError
from lit_bilevel.weights.optimizer import check_optimizer

ACCEPTED = {
    True: {"exponentiated_gradient", "sgd", "sparse_adam+eps"},
    False: {"exponentiated_gradient", "sgd", "sgd+momentum", "adamw+eps"},
}


def sparse(rows, values, size=6):
    return torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values).double(), (size,), check_invariants=False)


def test_exponentiated_gradient_is_mirror_descent_on_the_simplex():
    logits = torch.nn.Parameter(normal(6, seed=0))
    before, gradient = logits.detach().softmax(0), normal(6, seed=1)
    logits.grad = gradient
    ExponentiatedGradient([logits], lr=0.7).step()
    expected = before * (-0.7 * gradient).exp()
    torch.testing.assert_close(logits.detach().softmax(0), expected / expected.sum())


def test_rows_without_a_gradient_do_not_move():
    logits = torch.nn.Parameter(normal(6, seed=0))
    before = logits.detach().clone()
    optimizer = ExponentiatedGradient([logits], lr=0.5)
    logits.grad = sparse([1, 4], [2.0, -1.0])
    optimizer.step()
    expected = before.clone()
    expected[1] -= 1.0
    expected[4] += 0.5
    assert torch.equal(logits.detach(), expected)
    logits.grad = None
    optimizer.step()
    assert torch.equal(logits.detach(), expected)


def test_sparse_and_dense_gradients_agree_with_sgd():
    for gradient in (sparse([1, 4], [2.0, -1.0]), normal(6, seed=1)):
        ours, theirs = (torch.nn.Parameter(normal(6, seed=0)) for _ in range(2))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        ExponentiatedGradient([ours], lr=0.3).step()
        torch.optim.SGD([theirs], lr=0.3).step()
        assert torch.equal(ours, theirs)


def test_a_row_twice_in_a_window_takes_both_steps():
    logits = torch.nn.Parameter(torch.zeros(6).double())
    logits.grad = sparse([1, 1], [2.0, 3.0])
    ExponentiatedGradient([logits], lr=1.0).step()
    assert logits[1] == -5


def test_a_closure_gets_a_gradient():
    logits = torch.nn.Parameter(torch.zeros(3))
    optimizer = ExponentiatedGradient([logits], lr=1.0)

    def closure():
        loss = logits.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert logits.tolist() == [-1, -1, -1]


def test_a_negative_step_is_refused():
    with pytest.raises(UserError, match="`lr` is -1"):
        ExponentiatedGradient([torch.nn.Parameter(torch.zeros(1))], lr=-1)


@pytest.mark.parametrize("name", [name for name, make in WEIGHTINGS.items() if make().learnable])
def test_which_optimizers_are_accepted(name):
    weights = WEIGHTINGS[name]()
    weights.build(torch.arange(6) % 2)
    accepted = set()
    for optimizer, make in WEIGHT_OPTIMIZERS.items():
        made = make(weights.parameters())
        try:
            check_optimizer(weights, made)
            accepted.add(optimizer)
        except UserError as error:
            message = str(error)
            assert f"`{type(made).__name__}` is not safe for `{type(weights).__name__}`" in message
            assert "ExponentiatedGradient" in message or "set both to 0" in message
            assert f"`{type(made).__name__}`" not in message.partition("or more, or use")[2]
    assert accepted == ACCEPTED[weights.sparse]


def test_a_subclass_of_a_safe_optimizer_is_safe():
    class Mine(ExponentiatedGradient):
        pass

    weights = WEIGHTINGS["softmax"]()
    weights.build(torch.arange(6))
    check_optimizer(weights, Mine(weights.parameters()))
