"""The one-step solver: how much would a small step on this row's loss raise or lower the validation loss?

    s_i = −⟨d, ∇ℓ_i(θ)⟩       d = m, or P·m as the policy's Adam would step       m = running mean of ∇f over steps

The mean starts at 0 and is divided by 1 − βⁿ after n gradients, as Adam's are. Started at its first gradient instead,
it would be that one noisy gradient of an untrained policy for hundreds of steps: with β = 0.99 still 0.66 of it after
42 gradients, where the corrected mean has 0.02 of each.

Source: L2RW (arXiv 1803.09050), Meta-Weight-Net (1902.07379), DARTS (1806.09055), as a direction derivative:

    one-sided   −‖d‖·(ℓ_i(θ + ε·d/‖d‖) − ℓ_i(θ)) / ε             one more forward pass
    central     −‖d‖·(ℓ_i(θ + ε·d/‖d‖) − ℓ_i(θ − ε·d/‖d‖)) / 2ε   two more forward passes
    forward     forward-mode differentiation, exact               one pass that carries tangents

Differences lose their digits in bfloat16, so `auto` takes forward mode there; also in float64, which is chosen for
exactness; and one-sided differences, the cheapest, in float32.
Left out: per-example gradients, which cost a backward pass per row; unrolling over several steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem, RunningDirection, Values, add_values, norm, scale_values
from lit_bilevel.solvers.base import BilevelSolver


class OneStep(BilevelSolver):
    """Scores a row by the alignment of its gradient with the validation gradient.

    Args:
        derivative: `one_sided`, `central`, `forward`, or `auto` to choose by precision.
        epsilon: length of the finite step in parameter space; by default 1e-2 in float32 and 1e-4 in float64
            (1e-6 would do for the arithmetic, but models that normalise in float32 whatever their precision, as
            Llama does, then give scores that are 15 % noise).
        preconditioned: scale the direction by the second moments of the policy's optimizer, as its own step would.
        direction_decay: decay of the running mean of the validation gradient over steps; 0 uses this step's alone.
            Averaging takes out the noise of a small validation batch and of the policy's own oscillation.
        direction_every: compute the validation gradient in every so many steps, and keep the running mean in between.
    """

    scores_rest = True
    substitutes = True
    directional = True

    def __init__(
        self,
        derivative: Literal["auto", "one_sided", "central", "forward"] = "auto",
        epsilon: float | None = None,
        preconditioned: bool = True,
        direction_decay: float = 0.99,
        direction_every: int = 1,
    ):
        if derivative not in ("auto", "one_sided", "central", "forward"):
            raise UserError(f"`derivative` is {derivative!r}; it must be auto, one_sided, central or forward.")
        if not 0 <= direction_decay < 1:
            raise UserError(f"`direction_decay` is {direction_decay}; it must be in [0, 1).")
        if direction_every < 1 or (direction_every > 1 and direction_decay == 0):
            raise UserError(f"`direction_every` is {direction_every}; above 1 it needs `direction_decay` above 0.")
        if epsilon is not None and epsilon <= 0:
            raise UserError(f"`epsilon` is {epsilon}; it must be above 0.")
        if epsilon is not None and derivative == "forward":
            raise UserError(f"`epsilon` is {epsilon}, and `derivative: forward` takes no finite step; leave one out.")
        self.derivative = derivative
        self.epsilon = epsilon
        self.preconditioned = preconditioned
        self.direction_decay = direction_decay
        self.direction_every = direction_every
        self.release()

    def weight_gradient(self, problem: BilevelProblem) -> Tensor:
        # ∇f first: its backward pass must be over before the graph of the lower losses is built
        return self._scores(problem, self._direction(problem))

    def scores_at_rest(self, problem: BilevelProblem) -> Tensor:
        if self._running.average is None:  # no gradient so far
            return torch.zeros_like(problem.lower_losses())
        return self._scores(problem, self._running.mean(problem))

    def _scores(self, problem: BilevelProblem, direction: Values) -> Tensor:
        if self._derivative(problem) == "forward":
            return -problem.lower_jvp(direction)
        values = problem.values()
        epsilon = self.epsilon or (1e-4 if values[0].dtype == torch.float64 else 1e-2)
        length = norm(direction)  # 0 gives scores that are exactly 0, which the weights do not count as a step
        # of a length that does not depend on ‖d‖: along d itself, differences would drown in rounding where ∇f is small
        # and in curvature where it is large
        step = scale_values(direction, epsilon / length.clamp_min(torch.finfo(torch.float32).tiny))
        ahead_B = problem.lower_losses_at(add_values(values, step))
        if self._derivative(problem) == "central":
            behind_B = problem.lower_losses_at(add_values(values, step, -1.0))
            return (behind_B - ahead_B) * (length / (2 * epsilon))
        # the losses of the training pass, under the same dropout masks: one more pass is enough
        return (problem.lower_losses() - ahead_B) * (length / epsilon)

    def _derivative(self, problem: BilevelProblem) -> str:
        if self.derivative == "auto":
            # in float32 one more forward pass is the cheapest; below, a difference of losses is mostly rounding
            exact = not problem.differences or problem.values()[0].dtype == torch.float64
            return "forward" if exact else "one_sided"
        if self.derivative != "forward" and not problem.differences:
            raise UserError(
                f"`OneStep(derivative={self.derivative!r})` takes differences of losses, which vanish in the rounding"
                " of bfloat16, float16 or TF32; use `derivative: forward` (or `auto`), or `trainer.precision: 32-true`"
                " with `torch.set_float32_matmul_precision('highest')`."
            )
        return self.derivative

    def _direction(self, problem: BilevelProblem) -> Values:
        if self._running.average is None or self._steps % self.direction_every == 0:
            self._running.take(problem.upper_gradient())
        self._steps += 1  # of the solver, which may begin in a later phase than the run
        return self._running.mean(problem)

    def release(self) -> None:
        self._steps = 0
        self._running = RunningDirection(self.direction_decay, self.preconditioned)

    def state_dict(self) -> dict[str, Any]:
        state = self._running.state_dict()
        # empty before the first gradient: that is how a new fit tells a solver that was used
        return {**state, "steps": self._steps} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._running.load_state_dict(state)
            self._steps = state["steps"]
