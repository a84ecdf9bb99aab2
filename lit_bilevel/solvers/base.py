"""The socket for solvers: a bilevel problem in, one number per example out.

    dF/dω = mean_i s_i · dw_i/dω             s_i = N·∂F/∂w_i

so a solver never needs to know how weights are parameterised. Left out: solvers that change the policy's own step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem


class BilevelSolver(ABC):
    """Turns the two levels of a step into the score s_i of every example; weights descend it.

    State that has the shape of the policy's values is made at the first call, unless `load_state_dict` came before.
    """

    learns: bool = True
    """Whether the scores mean anything; without, no weight step is taken."""
    needs_upper_weight: bool = False
    """Whether the solver is undefined at λ = 0."""
    substitutes: bool = False
    """Whether it asks for ∇f by itself, or for anything at other values than the policy's own."""
    directional: bool = False
    """Whether it asks for derivatives of the losses along a direction, by differences or in forward mode."""
    second_order: bool = False
    """Whether it asks for Hessian-vector products."""
    folds: int = 1
    """Into how many folds it wants the pool dealt out; batches of lower rows then have rows of one fold each."""
    scores_rest: bool = False
    """Whether it has scores of rows at rest, by `scores_at_rest`."""
    prepares_only: bool = False
    """Whether it has no scores in a step, so that it is for phases that prepare it."""

    @abstractmethod
    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        """s_i = N·∂F/∂w_i of this process's examples, [B], detached."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and numbers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (most solvers have no state)
        """Take over what `state_dict` returned."""

    def prepare(self, problem: BilevelProblem) -> Tensor | None:
        """Advance what is kept from step to step at a policy that does not move, without scores.

        Returns:
            Losses of this process's examples under a model of the solver's own, [B], detached, for the log.
        """
        self.weight_gradient(problem)
        return None

    def scores_at_rest(self, problem: BilevelProblem) -> Tensor:
        """s_i of rows at the policy and the state as they are now, [B], detached; nothing learns and nothing is kept.

        A row's scores in training are of the moments when it was visited; these are of one moment, for all rows alike.

        Args:
            problem: whose lower losses and derivatives are asked for, and nothing of its upper level.

        Raises:
            UserError: where a solver has none.
        """
        raise UserError(
            f"`{type(self).__name__}` has no scores at rest; use `ValueFunction`, `OneStep` or `Penalty`, or leave"
            " `ClosingSweep` out."
        )

    def losses_at_rest(self, problem: BilevelProblem, fold: int) -> Tensor:
        """Losses of rows under a model of the pool that never learned them, [B], detached; nothing learns.

        Args:
            problem: whose lower losses at other values are asked for, and nothing of its upper level.
            fold: that all its rows are of.

        Raises:
            UserError: where a solver has no such model, or it has learned nothing.
        """
        raise UserError(f"`{type(self).__name__}` has no pool model that did not learn a row; use `CrossFit`.")

    def release(self) -> None:  # noqa: B027
        """Forget all that is kept from step to step; called where no later step of the run asks for scores."""

    def __call__(self, problem: BilevelProblem) -> Tensor:
        """Scores with their shape checked.

        Raises:
            ValueError: if the subclass returned another shape than the weights'.
        """
        # checked here, for a wrong shape would broadcast against the weights and teach them nonsense without an error
        s_B = self.weight_gradient(problem)
        expected = problem.weights().shape
        if not isinstance(s_B, Tensor) or s_B.shape != expected:
            got = tuple(s_B.shape) if isinstance(s_B, Tensor) else type(s_B).__name__
            raise ValueError(
                f"`{type(self).__name__}.weight_gradient` returned {got}; it must return a tensor {tuple(expected)}."
            )
        # a number for the weight step; with its graph that step would run through the policy once more
        return torch.as_tensor(s_B).detach()


def penalty_strength(problem: BilevelProblem) -> float:
    """γ = (1−λ)/λ.

    Raises:
        UserError: at λ = 0, where γ is infinite.
    """
    if problem.upper_weight == 0:
        raise UserError("the penalty strength (1−λ)/λ has no value at λ = 0; set `model.upper_weight` above 0.")
    return (1 - problem.upper_weight) / problem.upper_weight
