"""The value-function solver: how much worse does the policy fit this row than a model that fits the pool alone?

    s_i = γ·(ℓ_i(θ) − ℓ_i(φ))        γ = (1−λ)/λ        φ ≈ argmin_φ g(φ, ω)

By the envelope theorem this is the gradient of f + γ·(g(θ) − min g), whose minimiser is off by O(1/γ).

Source: PBGD (arXiv 2302.05185), F2SA (2301.10945), BOME (2209.08709), ScaleBiO (2406.19976), SEAL's full form
(2410.07471). φ starts as a copy of θ, so the scores are 0 until it has moved. It is trained beside the policy
(`pool_model.py`), at the policy's current learning rate.

Left out: a schedule that raises γ; `upper_weight` decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem
from lit_bilevel.solvers.base import BilevelSolver, penalty_strength
from lit_bilevel.solvers.pool_model import PoolModel


class ValueFunction(BilevelSolver):
    """Scores a row by the contrast between the policy and a model trained on the weighted pool alone.

    Args:
        inner_steps: steps of the pool model φ for one policy step; each costs a forward and a backward pass.
        optimizer: makes φ's optimizer; it should be of the policy's kind, for φ must not fit faster than θ. Its
            learning rate is set before every step.
        learning_rate: φ's learning rate; by default the policy's current one. A larger one makes the scores a contrast
            between a model that knows the pool and a policy that barely moved towards validation: for selection alone.
        weighted: whether φ learns the rows by their weights, as the value function has it. Without, φ is a model of the
            whole pool, and scores are those of equal weights: where weights begin at a prior, φ would otherwise not
            learn what the prior weighs down, and say nothing of it.
    """

    scores_rest = True
    needs_upper_weight = True
    substitutes = True

    def __init__(
        self,
        inner_steps: int = 1,
        optimizer: Callable[[Iterable], Optimizer] = torch.optim.AdamW,
        learning_rate: float | None = None,
        weighted: bool = True,
    ):
        if inner_steps < 1:
            raise UserError(f"`inner_steps` is {inner_steps}; it must be at least 1.")
        if learning_rate is not None and not learning_rate > 0:
            raise UserError(f"`learning_rate` of `ValueFunction` is {learning_rate}; it must be above 0.")
        self.inner_steps = inner_steps
        self.learning_rate = learning_rate
        self.weighted = weighted
        self.optimizer = optimizer
        self._model = PoolModel(optimizer, learning_rate, weighted)

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        gamma = penalty_strength(problem)
        policy_loss_B = problem.lower_losses()
        begins = not self._model.begun
        pool_loss_B = self.prepare(problem)
        if begins and self.inner_steps == 1:  # φ was θ in that pass; what differs is the rounding of two kernels
            return torch.zeros_like(policy_loss_B)
        return gamma * (policy_loss_B - pool_loss_B)

    def prepare(self, problem: BilevelProblem) -> Tensor:
        for _ in range(self.inner_steps):
            pool_loss_B = self._model.step(problem)
        return pool_loss_B

    def scores_at_rest(self, problem: BilevelProblem) -> Tensor:
        policy_loss_B = problem.lower_losses()
        return penalty_strength(problem) * (policy_loss_B - self._model.losses_at(problem))

    def release(self) -> None:
        self._model.release()

    def state_dict(self) -> dict[str, Any]:
        return self._model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._model.load_state_dict(state)
