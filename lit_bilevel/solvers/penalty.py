"""The penalty solver: s_i = γ·ℓ_i(θ) with γ = (1−λ)/λ.

Source: SEAL's memory-saving form (arXiv 2410.07471) and the offline method of arXiv 2511.21056. The policy follows
λ·f + (1−λ)·g, and a row's weight falls with its loss under that policy. This equals `ValueFunction` only where the
lower level can reach loss 0 on every row; elsewhere it minimises another objective, f + γ·g without the subtracted
minimum of g, and keeps rows that are *easy* for a policy steered by validation, repetitive rows included.

The template to copy for a new solver. Left out: an upper bound on γ; `upper_weight` has a schedule for that.
"""

from __future__ import annotations

from torch import Tensor

from lit_bilevel.problem import BilevelProblem
from lit_bilevel.solvers.base import BilevelSolver, penalty_strength


class Penalty(BilevelSolver):
    """Scores a row by its own loss, at no cost beyond the policy step."""

    scores_rest = True
    needs_upper_weight = True

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        return penalty_strength(problem) * problem.lower_losses()

    def scores_at_rest(self, problem: BilevelProblem) -> Tensor:
        return self.weight_gradient(problem)
