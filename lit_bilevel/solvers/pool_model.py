"""A model of the pool: values of the policy's shape that learn pool rows, beside the policy.

    φ ← optimizer( (1−λ)·∇ mean_i w_i·ℓ_i(φ) )        φ starts as a copy of θ

It sees (1−λ)·g as the policy does: on all of g it would fit the pool faster than θ, and every row would look easier to
it, good or bad. It is a second set of adapter values on the same frozen base, or a second copy where the whole model is
tuned. Left out: gradient clipping.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.problem import BilevelProblem, Values, norm, scale_values

SKIPPED = 10
"""Steps in a row after which it is told that they were skipped."""


class PoolModel:
    """Values φ that learn the lower level alone.

    Args:
        optimizer: makes φ's optimizer.
        learning_rate: φ's; by default the policy's current one.
        weighted: whether φ learns the rows by their weights.
    """

    def __init__(self, optimizer: Callable[[Iterable], Optimizer], learning_rate: float | None, weighted: bool):
        self.optimizer, self.learning_rate, self.weighted = optimizer, learning_rate, weighted
        self.values: Values = []
        self._optimizer: Optimizer | None = None
        self._skipped = 0  # steps in a row

    @property
    def begun(self) -> bool:
        """Whether φ is there; before, it is θ."""
        return self._optimizer is not None

    def step(self, problem: BilevelProblem) -> Tensor:
        """One step of φ; returns the losses [B] before it, from the same forward pass."""
        if self._optimizer is None:
            self._begin(problem.values())
        assert self._optimizer is not None
        loss_B, gradient = problem.lower_gradient_at(self.values, self.weighted)
        if torch.isfinite(norm(gradient)):  # one overflow would spoil φ for the rest of the run
            for value, part in zip(self.values, scale_values(gradient, 1 - problem.upper_weight), strict=True):
                value.grad = part
            for group in self._optimizer.param_groups:  # the policy's schedule may have moved since
                group["lr"] = problem.learning_rate if self.learning_rate is None else self.learning_rate
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._skipped = 0
        else:
            self._tell_skipped()
        return loss_B

    def losses_at(self, problem: BilevelProblem) -> Tensor:
        """[B] losses under φ as it is; under the policy where φ has not begun."""
        return problem.lower_losses_at(self.values) if self.begun else problem.lower_losses()

    def release(self) -> None:
        """Forget φ."""
        self.values, self._optimizer = [], None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty before the first step."""
        if self._optimizer is None:
            return {}
        return {"values": self.values, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if state:
            self._begin(state["values"])
            assert self._optimizer is not None
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on with the same tensors

    def _tell_skipped(self) -> None:
        self._skipped += 1  # where the loss is scaled, one now and then is no fault
        if self._skipped == SKIPPED:
            warnings.warn(
                f"{SKIPPED} steps of a pool model in a row were skipped, because their gradients are not finite, so it"
                " learns nothing, and what it says of rows means little; lower `model.solver.learning_rate`, or set"
                " `trainer.precision: bf16-mixed`.",
                stacklevel=2,
            )

    def _begin(self, values: Values) -> None:
        # copies: φ's optimizer writes into them, and the policy must not move along
        self.values = [value.detach().clone() for value in values]
        self._optimizer = self.optimizer(self.values)
