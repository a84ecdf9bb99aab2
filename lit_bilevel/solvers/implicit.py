"""The implicit solver: the exact hypergradient at the lower optimum, by Hessian-vector products.

    s_i = −(1−λ)·⟨x, ∇ℓ_i(θ)⟩        H·x = ∇f,   H = ∇²_θ(λ·f + (1−λ)·g) + damping·I

    conjugate_gradient   k steps, exact after as many as θ has numbers (in exact arithmetic)
    neumann              x = α·Σ_{j<k} (I − α·H)^j ∇f, converges for 0 < α < 2/‖H‖ (arXiv 1911.02590)

Source: implicit function theorem; AID (arXiv 1802.02246, 1909.04630). Exact only where θ minimises λ·f + (1−λ)·g, and
only where H is positive definite: conjugate gradient stops at a direction of negative curvature. For problems with few
parameters, and the reference that the tests hold other solvers against.

Left out: warm starts of x from step to step, and preconditioning.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem, Values, add_values, dot, norm, scale_values
from lit_bilevel.solvers.base import BilevelSolver

TOLERANCE = 1e-10


class Implicit(BilevelSolver):
    """Scores a row by what the implicit function theorem says about its weight.

    Args:
        method: how the linear system is solved, `conjugate_gradient` or `neumann`.
        iterations: most Hessian-vector products of a step.
        tolerance: conjugate gradient stops at this residual, relative to ‖∇f‖.
        damping: added to the diagonal of H; makes it positive definite on non-convex problems.
        step_size: α of the Neumann series; by default the policy's learning rate.
    """

    substitutes = True
    directional = True
    second_order = True

    def __init__(
        self,
        method: Literal["conjugate_gradient", "neumann"] = "conjugate_gradient",
        iterations: int = 10,
        tolerance: float = TOLERANCE,
        damping: float = 0.0,
        step_size: float | None = None,
    ):
        if method not in ("conjugate_gradient", "neumann"):
            raise UserError(f"`method` is {method!r}; it must be conjugate_gradient or neumann.")
        if iterations < 1:
            raise UserError(f"`iterations` is {iterations}; it must be at least 1.")
        if damping < 0:
            raise UserError(f"`damping` is {damping}; it must be at least 0.")
        if step_size is not None and step_size <= 0:
            raise UserError(f"`step_size` is {step_size}; it must be above 0.")
        if method == "neumann" and tolerance != TOLERANCE:
            raise UserError(f"`tolerance` is {tolerance}, which `method: neumann` does not use; set `iterations`.")
        if method == "conjugate_gradient" and step_size is not None:
            raise UserError(f"`step_size` is {step_size}, which only `method: neumann` uses; leave it out.")
        self.method = method
        self.iterations = iterations
        self.tolerance = tolerance
        self.damping = damping
        self.step_size = step_size

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        gradient = problem.upper_gradient()
        # H is that of the policy's own objective, λ·f + (1−λ)·g, for it is its minimiser that moves with ω
        solve = self._neumann if self.method == "neumann" else self._conjugate_gradient
        return -(1 - problem.upper_weight) * problem.lower_jvp(solve(problem, gradient))

    def _product(self, problem: BilevelProblem, vector: Values) -> Values:
        return add_values(problem.hessian_vector_product(vector), vector, self.damping)

    def _conjugate_gradient(self, problem: BilevelProblem, right: Values) -> Values:
        solution = [torch.zeros_like(value) for value in right]
        residual = direction = right  # from 0, so that the first direction is ∇f
        squared = dot(residual, residual)
        target = (self.tolerance * norm(right)) ** 2
        for iteration in range(self.iterations):
            if squared <= target:  # waits for the device, which is little beside a Hessian-vector product
                break
            product = self._product(problem, direction)
            curvature = dot(direction, product)
            if curvature <= 0:  # not a minimum in this direction; the first one is then ∇f itself
                return right if iteration == 0 else solution
            step = squared / curvature
            solution = add_values(solution, scale_values(direction, step))
            residual = add_values(residual, scale_values(product, -step))
            previous, squared = squared, dot(residual, residual)
            direction = add_values(residual, scale_values(direction, squared / previous))
        return solution

    def _neumann(self, problem: BilevelProblem, right: Values) -> Values:
        # the series converges at any rate at which gradient descent on the policy's objective would
        alpha = problem.learning_rate if self.step_size is None else self.step_size
        term = total = right
        for _ in range(self.iterations - 1):
            term = add_values(term, self._product(problem, term), -alpha)
            total = add_values(total, term)
        return scale_values(total, alpha)
