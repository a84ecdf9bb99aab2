"""BMO weights in closed form: w_i = exp(−ℓ_i/τ) / Ẑ, with Ẑ the pool's mean of exp(−ℓ/τ) as it runs along.

The lower level asks for a weakly Pareto-optimal θ of all the rows' losses. If some θ brings every ℓ_i to 0 at once,
that means min_i ℓ_i(θ) = 0; the minimum smoothed by a temperature, −τ·log mean_i exp(−ℓ_i/τ), has the gradient
mean_i w_i ∇ℓ_i (arXiv 2511.21056, bilevel multi-objective; the derivation is ours).

Nothing is learned: use it with the `Mixing` solver and λ > 0, through which validation decides whose loss falls. Left
out: a schedule of the temperature.
"""

from __future__ import annotations

from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.running import RunningWeights


class BMOWeights(RunningWeights):
    """Weights that fall with a row's own loss, without any parameter.

    Args:
        temperature: τ in nats per token; a row whose loss is τ higher weighs e times less.
        decay: β of the running normaliser.
    """

    learnable = False
    needs_upper_weight = True

    def __init__(self, temperature: float = 0.5, decay: float = 0.99) -> None:
        super().__init__(decay=decay)
        if temperature <= 0:
            raise UserError(f"`temperature` is {temperature}; it must be above 0.")
        self.temperature = temperature

    def log_unnormalised(self, features: Features) -> Tensor:
        assert features.loss_B is not None
        return -features.loss_B.double() / self.temperature

    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        raise UserError("`BMOWeights` has a closed form and learns from no scores; use the `Mixing` solver with it.")
