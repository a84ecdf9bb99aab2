"""Direct mixing: minimise λ·f + (1−λ)·mean_i ℓ_i with no selection. The baseline every solver must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_bilevel.problem import BilevelProblem
from lit_bilevel.solvers.base import BilevelSolver


class Mixing(BilevelSolver):
    """Learns no weights; also the solver for weights that have a closed form."""

    learns = False

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        return torch.zeros_like(problem.lower_losses())
