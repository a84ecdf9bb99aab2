"""The value-function solver: how much worse does the policy fit this row than a model that fits the pool alone?

    s_i = γ·(ℓ_i(θ) − ℓ_i(φ))        γ = (1−λ)/λ        φ ≈ argmin_φ g(φ, ω)

By the envelope theorem this is the gradient of f + γ·(g(θ) − min g), whose minimiser is off by O(1/γ).

Source: PBGD (arXiv 2302.05185), F2SA (2301.10945), BOME (2209.08709), ScaleBiO (2406.19976), SEAL's full form
(2410.07471). φ starts as a copy of θ, so the scores are 0 until it has moved. It is trained on (1−λ)·g beside the
policy, at the policy's current learning rate: a second set of adapter values on the same frozen base, or a second copy
where the whole model is tuned.

Left out: a schedule that raises γ (`upper_weight` decides it), and gradient clipping for φ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem, Values, norm, scale_values
from lit_bilevel.solvers.base import BilevelSolver, penalty_strength


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
        self.inner_steps = inner_steps
        self.learning_rate = learning_rate
        self.weighted = weighted
        self.optimizer = optimizer
        self._values: Values = []
        self._optimizer: Optimizer | None = None

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        gamma = penalty_strength(problem)
        policy_loss_B = problem.lower_losses()
        begins = self._optimizer is None
        pool_loss_B = self.prepare(problem)
        if begins and self.inner_steps == 1:  # φ was θ in that pass; what differs is the rounding of two kernels
            return torch.zeros_like(policy_loss_B)
        return gamma * (policy_loss_B - pool_loss_B)

    def prepare(self, problem: BilevelProblem) -> Tensor:
        if self._optimizer is None:
            self._begin(problem.values())
        for _ in range(self.inner_steps):
            pool_loss_B = self._inner_step(problem)
        return pool_loss_B

    def _begin(self, values: Values) -> None:
        # copies: φ's optimizer writes into them, and the policy must not move along
        self._values = [value.detach().clone() for value in values]
        self._optimizer = self.optimizer(self._values)

    def _inner_step(self, problem: BilevelProblem) -> Tensor:
        """One step of φ; returns the losses before it, from the same forward pass."""
        assert self._optimizer is not None
        loss_B, gradient = problem.lower_gradient_at(self._values, self.weighted)
        if torch.isfinite(norm(gradient)):  # one overflow would spoil φ for the rest of the run
            # the policy sees (1−λ)·g: on all of g φ would fit the pool faster than θ, and every row would look easier
            # to φ, whether it is good or bad
            for value, part in zip(self._values, scale_values(gradient, 1 - problem.upper_weight), strict=True):
                value.grad = part
            for group in self._optimizer.param_groups:  # the policy's schedule may have moved since
                group["lr"] = problem.learning_rate if self.learning_rate is None else self.learning_rate
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return loss_B

    def scores_at_rest(self, problem: BilevelProblem) -> Tensor:
        policy_loss_B = problem.lower_losses()
        return penalty_strength(problem) * (policy_loss_B - self.losses_at(problem))

    def losses_at(self, problem: BilevelProblem) -> Tensor:
        """[B] losses under φ as it is; under the policy where φ has not begun."""
        return problem.lower_losses_at(self._values) if self._values else problem.lower_losses()

    def release(self) -> None:
        self._values, self._optimizer = [], None

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return {}
        return {"values": self._values, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._begin(state["values"])
            assert self._optimizer is not None
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on with the same tensors
