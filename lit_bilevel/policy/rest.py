"""The lower level of a bilevel problem for rows that no step is taken on: no graph, no validation rows, no weights.

    s_B = solver.scores_at_rest(RestingProblem(policy, batch, upper_weight, optimizer, engine, objective))

Left out: everything of the upper level; a solver that asks for it has no scores at rest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.objectives.base import Objective
from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.types import Batch


class RestingProblem(PolicyProblem):
    """Some rows under the policy as it is.

    Args:
        policy: with dropout off.
        batch: the rows.
        upper_weight: λ.
        optimizer: the policy's, whose second moments scale directions.
        engine: the machinery around a step.
        objective: of the lower level.
    """

    def __init__(
        self,
        policy: Policy,
        batch: Batch,
        upper_weight: float,
        optimizer: Optimizer,
        engine: Engine,
        objective: Objective,
    ):
        def weigh(features: object) -> Tensor:
            raise AssertionError("rows at rest have no weights")

        super().__init__(policy, [batch], [], weigh, False, upper_weight, optimizer, engine, (objective, objective))

    def lower_losses(self) -> Tensor:
        if self._lower_losses is None:
            with self._lower_pass(), torch.no_grad():
                self._lower_losses = self._lower_losses_of(self.lower[0]).detach()
        return self._lower_losses
