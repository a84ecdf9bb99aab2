"""Keeps two pool models, each of which learns half of the pool, so that every row has one that never learned it.

    φ_0 learns the rows of fold 1, φ_1 those of fold 0        ℓ_i(φ_k) of row i in fold k is held out

A model that has learned a row makes it look easier than a trusted row, which it has not learned, whatever the two are
worth. Held-out losses can be compared: `CleanProbability` asks how far they tell trusted rows from pool rows. For
example, where most answers in the pool are right, held-out losses are low on right answers and high on wrong ones;
where the junk is of a kind, they are low on junk, which the policy's own loss is not.

Two models cost what one does, for a row is learned by one of them: in a phase in which the policy rests, half of a step
of `Mixing`. The idea of cross-fitting: Chernozhukov et al. (arXiv 1608.00060); of what a model learns of noisy data:
co-teaching (1804.06872).

Left out: more than two folds, and scores in a step; the weights are set at the end of the phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem
from lit_bilevel.solvers.base import BilevelSolver
from lit_bilevel.solvers.pool_model import PoolModel


class CrossFit(BilevelSolver):
    """Learns the pool twice by halves, to tell how every row looks to a model that has not learned it.

    Args:
        optimizer: makes the optimizers of both models.
        learning_rate: of both models; the policy rests, so it has no current one.
    """

    substitutes = True
    folds = 2
    prepares_only = True

    def __init__(self, learning_rate: float = 1e-3, optimizer: Callable[[Iterable], Optimizer] = torch.optim.AdamW):
        if not learning_rate > 0:
            raise UserError(f"`learning_rate` of `CrossFit` is {learning_rate}; it must be above 0.")
        self.learning_rate, self.optimizer = learning_rate, optimizer
        self._models = [PoolModel(optimizer, learning_rate, weighted=False) for _ in range(self.folds)]

    def prepare(self, problem: BilevelProblem) -> Tensor:
        folds = [problem.fold(number, self.folds) for number in range(self.folds)]
        return torch.cat([self._models[1 - number].step(fold) for number, fold in enumerate(folds)])

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        losses_B = problem.lower_losses()  # where a step has a pass of the policy all the same
        self.prepare(problem)
        return torch.zeros_like(losses_B)

    def losses_at_rest(self, problem: BilevelProblem, fold: int) -> Tensor:
        if not self._models[fold].begun:
            raise UserError(
                "the pool models of `CrossFit` have learned nothing yet, or were let go when their phase was over; set"
                " the weights at the end of a phase with `prepare_solver`."
            )
        return self._models[fold].losses_at(problem)

    def release(self) -> None:
        for model in self._models:
            model.release()

    def state_dict(self) -> dict[str, Any]:
        states = [model.state_dict() for model in self._models]
        return {str(number): state for number, state in enumerate(states) if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, model in enumerate(self._models):
            model.load_state_dict(state.get(str(number), {}))
