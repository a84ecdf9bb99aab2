"""Bilevel problems whose answer is known, and the lists that run every property on every class.

A new weighting or solver is one line in `WEIGHTINGS` or `SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from lit_bilevel import (
    BilevelSolver,
    BMOWeights,
    ExampleWeights,
    ExponentiatedGradient,
    Implicit,
    Mixing,
    NetworkWeights,
    OneStep,
    Penalty,
    SigmoidWeights,
    SoftmaxWeights,
    SourceWeights,
    UniformWeights,
    ValueFunction,
)
from lit_bilevel.problem import BilevelProblem, Values
from lit_bilevel.types import Features

WEIGHTINGS: dict[str, Callable[[], ExampleWeights]] = {
    "softmax": SoftmaxWeights,
    "sigmoid": SigmoidWeights,
    "softmax+temperature": partial(SoftmaxWeights, temperature=2.0),
    "softmax+kl": partial(SoftmaxWeights, kl_to_prior=0.1),
    "softmax+floor": partial(SoftmaxWeights, floor=0.1),
    "softmax+cap": partial(SoftmaxWeights, cap=3.0),
    "sigmoid+keep+cap": partial(SigmoidWeights, keep=0.8, cap=2.0),
    "source": SourceWeights,
    "network": NetworkWeights,
    "bmo": BMOWeights,
    "uniform": UniformWeights,
}
SOLVERS: dict[str, Callable[[], BilevelSolver]] = {
    "mixing": Mixing,
    "penalty": Penalty,
    "value_function": ValueFunction,
    "one_step": OneStep,
    "implicit": Implicit,
}
WEIGHT_OPTIMIZERS: dict[str, Callable[[Iterable], torch.optim.Optimizer]] = {
    "exponentiated_gradient": partial(ExponentiatedGradient, lr=0.3),
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "sgd+momentum": partial(torch.optim.SGD, lr=0.3, momentum=0.9),
    "sparse_adam": partial(torch.optim.SparseAdam, lr=0.3),
    "sparse_adam+eps": partial(torch.optim.SparseAdam, lr=0.3, eps=1.0),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "adamw+eps": partial(torch.optim.AdamW, lr=0.1, eps=1.0),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearProblem(BilevelProblem):
    """Least squares on both levels: ℓ_i = ½(x_i·θ − y_i)², f the mean of the same over validation rows.

    Args:
        theta: [D] parameters.
        lower: x [B, D] and y [B] of the pool rows.
        upper: the same of validation rows.
        weight_B: weights of the pool rows.
        ridge: g gains ½·ridge·‖θ‖².
    """

    def __init__(
        self,
        theta: Tensor,
        lower: tuple[Tensor, Tensor],
        upper: tuple[Tensor, Tensor],
        weight_B: Tensor,
        upper_weight: float,
        learning_rate: float = 0.1,
        ridge: float = 0.0,
    ):
        super().__init__(upper_weight, learning_rate)
        self.theta, self.lower, self.upper, self.weight_B, self.ridge = theta, lower, upper, weight_B, ridge

    def weights(self) -> Tensor:
        return self.weight_B

    def values(self) -> Values:
        return [self.theta]

    def upper_loss_at(self, theta: Tensor) -> Tensor:
        x, y = self.upper
        return (0.5 * (x @ theta - y) ** 2).mean()

    def upper_gradient(self) -> Values:
        x, y = self.upper
        return [x.T @ (x @ self.theta - y) / len(y)]

    def lower_losses(self) -> Tensor:
        return self.lower_losses_at([self.theta])

    def lower_losses_at(self, values: Values) -> Tensor:
        x, y = self.lower
        return 0.5 * (x @ values[0] - y) ** 2

    def lower_gradient_at(self, values: Values, weighted: bool = True) -> tuple[Tensor, Values]:
        x, y = self.lower
        residual = x @ values[0] - y
        pulled = self.weight_B * residual if weighted else residual
        return 0.5 * residual**2, [x.T @ pulled / len(y) + self.ridge * values[0]]

    def lower_jvp(self, direction: Values) -> Tensor:
        x, y = self.lower
        return (x @ self.theta - y) * (x @ direction[0])

    def hessian(self) -> Tensor:
        """∇²(λ·f + (1−λ)·g), [D, D]."""
        lower, upper = self.lower[0], self.upper[0]
        eye = torch.eye(len(self.theta), dtype=self.theta.dtype)
        g = lower.T @ (self.weight_B[:, None] * lower) / len(lower) + self.ridge * eye
        return self.upper_weight * upper.T @ upper / len(upper) + (1 - self.upper_weight) * g

    def hessian_vector_product(self, vector: Values) -> Values:
        return [self.hessian() @ vector[0]]

    def precondition(self, direction: Values) -> Values:
        return direction

    def step(self) -> Tensor:
        """θ after one gradient step on λ·f + (1−λ)·g."""
        lower = self.lower_gradient_at([self.theta])[1][0]
        total = self.upper_weight * self.upper_gradient()[0] + (1 - self.upper_weight) * lower
        return self.theta - self.learning_rate * total

    def optimum(self) -> Tensor:
        """argmin of λ·f + (1−λ)·g, in closed form; differentiable in `weight_B`."""
        (x, y), (x_upper, y_upper) = self.lower, self.upper
        right = self.upper_weight * x_upper.T @ y_upper / len(y_upper)
        right = right + (1 - self.upper_weight) * x.T @ (self.weight_B * y) / len(y)
        return torch.linalg.solve(self.hessian(), right)


def ridge_problem(upper_weight: float, rows: int = 12, size: int = 4) -> LinearProblem:
    """Weighted ridge regression with unequal weights, at its lower optimum."""
    lower = (0.5 * normal(rows, size, seed=0), normal(rows, seed=1))
    upper = (0.5 * normal(8, size, seed=2), normal(8, seed=3))
    weight_B = normal(rows, seed=4).exp()
    weight_B = weight_B / weight_B.mean()
    problem = LinearProblem(torch.zeros(size).double(), lower, upper, weight_B, upper_weight, ridge=0.1)
    problem.theta = problem.optimum()
    problem.learning_rate = float(1.0 / torch.linalg.eigvalsh(problem.hessian()).max())
    return problem


def hypergradient(problem: LinearProblem) -> Tensor:
    """N·dF/dw by automatic differentiation through the closed-form optimum."""
    weight_B = problem.weight_B.clone().requires_grad_()
    theta = problem.theta
    moving = LinearProblem(theta, problem.lower, problem.upper, weight_B, problem.upper_weight, ridge=problem.ridge)
    (gradient,) = torch.autograd.grad(problem.upper_loss_at(moving.optimum()), weight_B)
    return len(weight_B) * gradient


def interpolating_problem(upper_weight: float = 0.2) -> LinearProblem:
    """Fewer pool rows than parameters, so that some θ has loss 0 on all of them."""
    rows, size = 6, 9
    truth, x = normal(size, seed=5), normal(rows, size, seed=6)
    upper = (normal(8, size, seed=7), normal(8, seed=8))
    problem = LinearProblem(normal(size, seed=9), (x, x @ truth), upper, torch.ones(rows).double(), upper_weight)
    problem.learning_rate = float(rows / torch.linalg.matrix_norm(x, 2) ** 2)
    return problem


def planted_problem(upper_weight: float, useful: int = 20, useless: int = 10, size: int = 4) -> LinearProblem:
    """Rows 0 … useful−1 follow the validation rows' θ, the others clearly another one; the optimum is unique."""
    truth, away = normal(size, seed=10), torch.ones(size).double()
    x = normal(useful + useless, size, seed=12)
    x[useful:] = 0.3 * x[useful:] + away / 2  # no useless row is nearly useful by chance
    y = torch.cat([x[:useful] @ truth, x[useful:] @ (truth + away)])
    x_upper = normal(12, size, seed=13)
    ones = torch.ones(useful + useless).double()
    return LinearProblem(torch.zeros(size).double(), (x, y), (x_upper, x_upper @ truth), ones, upper_weight)


def separable_problem(upper_weight: float) -> LinearProblem:
    """Some θ fits every row, but only the first four agree with argmin f, where f is not 0."""
    rows, size = 7, 9
    x, x_upper = normal(rows, size, seed=14), normal(30, size, seed=15)
    y_upper = x_upper @ normal(size, seed=16) + normal(30, seed=17)
    best = torch.linalg.lstsq(x_upper, y_upper[:, None]).solution[:, 0]
    y = x @ best + torch.tensor([0.0] * 4 + [3.0, -3.0, 4.0]).double()
    return LinearProblem(
        torch.zeros(size).double(), (x, y), (x_upper, y_upper), torch.ones(rows).double(), upper_weight
    )


def train(
    problem: LinearProblem,
    weights: ExampleWeights,
    solver: BilevelSolver,
    steps: int,
    weight_lr: float = 0.3,
    optimizer: Callable[..., torch.optim.Optimizer] = ExponentiatedGradient,
) -> LinearProblem:
    """Alternate policy and weight steps on all rows at once, as `LitBilevel` does; returns the trained problem."""
    rows = torch.arange(len(problem.weight_B))
    features = Features(rows, torch.zeros_like(rows), torch.ones_like(rows))
    if weights.pool_rows == 0:
        weights.build(features.source_B, torch.float64)
    parameters = list(weights.parameters())
    outer = optimizer(parameters, lr=weight_lr) if parameters else None
    for _ in range(steps):
        seen = features.with_loss(problem.lower_losses())
        problem.weight_B = weights(seen).double()
        s_B = solver(problem) if solver.learns else None
        problem.theta = problem.step()
        weights.observe(seen)
        if outer is not None and s_B is not None:
            weights.set_gradient(seen, s_B)
            outer.step()
            outer.zero_grad()
            weights.after_step()
    return problem
