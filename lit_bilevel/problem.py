"""The interface between solvers and a bilevel problem, and the little algebra that solvers need.

    min_ω f(θ*(ω))      θ*(ω) ∈ argmin_θ  mean_i w_i(ω)·ℓ_i(θ)           (arXiv 2511.21056)

`Values` are the trainable parameters (or a gradient, or a direction) as a list of tensors in a fixed order. A solver
sees a problem and nothing else: no model, no batch, no trainer. Tests hand it quadratics.

Left out: constraints and stochastic line searches; nothing here asks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Values = list[Tensor]


class BilevelProblem(ABC):
    """The two levels of one policy step, as functions of the trainable values θ.

    All gradients are global: averaged over every example of the step on every process. Per-example results cover
    this process's B examples.

    Args:
        upper_weight: λ; the policy minimises λ·f + (1−λ)·g.
        learning_rate: the policy optimizer's current step size.
        differences: whether finite differences keep their digits (float32 or better, no autocast).
    """

    def __init__(self, upper_weight: float, learning_rate: float, differences: bool = True):
        self.upper_weight = upper_weight
        self.learning_rate = learning_rate
        self.differences = differences

    @abstractmethod
    def weights(self) -> Tensor:
        """w_i, [B], detached, 0 for padding."""

    @abstractmethod
    def values(self) -> Values:
        """θ, detached; not to be written to."""

    def fold(self, number: int, folds: int) -> BilevelProblem:
        """The same step over those of its lower rows that are of one fold, for passes at any values.

        Args:
            number: of the fold, from 0.
            folds: how many a solver has asked for by its `folds`.
        """
        raise NotImplementedError

    @abstractmethod
    def upper_gradient(self) -> Values:
        """∇f(θ)."""

    @abstractmethod
    def lower_losses(self) -> Tensor:
        """ℓ_i(θ), [B], detached."""

    @abstractmethod
    def lower_losses_at(self, values: Values) -> Tensor:
        """ℓ_i at other values, [B], with the same dropout masks as `lower_losses`."""

    @abstractmethod
    def lower_gradient_at(self, values: Values, weighted: bool = True) -> tuple[Tensor, Values]:
        """ℓ_i at other values, [B], and the gradient there of the lower objective mean_i w_i·ℓ_i, or of mean_i ℓ_i."""

    @abstractmethod
    def lower_jvp(self, direction: Values) -> Tensor:
        """⟨∇ℓ_i(θ), direction⟩, [B], exact (forward-mode differentiation)."""

    @abstractmethod
    def hessian_vector_product(self, vector: Values) -> Values:
        """∇²_θ(λ·f + (1−λ)·g) · vector."""

    @abstractmethod
    def precondition(self, direction: Values) -> Values:
        """P·direction with P = 1/(√v̂′ + eps) of the policy's Adam, v̂′ being v̂ after a step along the direction.

        With v̂ alone, a parameter whose gradient was 0 so far (a rare token's embedding) would be scaled by 1/eps and
        outweigh all others.

        Raises:
            UserError: if the optimizer keeps no second moments.
        """


class RunningDirection:
    """The running mean of ∇f over steps, from 0 and divided by 1 − βⁿ after n gradients, as Adam's are.

    Args:
        decay: β; 0 keeps the last gradient alone.
        preconditioned: whether it is scaled as the policy's Adam would step along it.
    """

    def __init__(self, decay: float = 0.99, preconditioned: bool = True):
        self.decay, self.preconditioned = decay, preconditioned
        self.average: Values | None = None
        self.gradients: Tensor | None = None

    def take(self, gradient: Values) -> None:
        """Let the mean take in a gradient, if it is finite: one overflow would spoil it for the whole run."""
        size = norm(gradient)
        if self.average is None:
            self.average = [torch.zeros_like(value) for value in gradient]
            self.gradients = torch.zeros_like(size, dtype=torch.float64)
        finite = torch.isfinite(size)
        gradient = [torch.where(finite, new, old) for new, old in zip(gradient, self.average, strict=True)]
        torch._foreach_lerp_(self.average, gradient, 1 - self.decay)
        assert self.gradients is not None
        self.gradients += finite

    def mean(self, problem: BilevelProblem) -> Values:
        """The direction, at the policy of a problem."""
        assert self.average is not None
        assert self.gradients is not None
        # no gradient was finite so far: 0, without asking the device
        corrected = (1 - self.decay**self.gradients).clamp_min(torch.finfo(torch.float32).tiny)
        mean = scale_values(self.average, (1 / corrected).to(self.average[0].dtype))
        return problem.precondition(mean) if self.preconditioned else mean

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty before the first gradient."""
        return {} if self.average is None else {"average": self.average, "gradients": self.gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if state:
            self.average, self.gradients = [value.clone() for value in state["average"]], state["gradients"].clone()


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product, a scalar tensor."""
    return torch.stack([whole((x * y).sum()) for x, y in zip(left, right, strict=True)]).sum()


def norm(values: Sequence[Tensor]) -> Tensor:
    """Euclidean norm, a scalar tensor."""
    return whole(torch.nn.utils.get_total_norm(values))


def scale_values(values: Sequence[Tensor], factor: Tensor | float) -> Values:
    """factor · values."""
    return list(torch._foreach_mul(list(values), factor))


def add_values(values: Sequence[Tensor], other: Sequence[Tensor], factor: float = 1.0) -> Values:
    """values + factor · other."""
    return list(torch._foreach_add(list(values), list(other), alpha=factor))


def whole(value: Tensor) -> Tensor:
    """A sharded tensor as an ordinary one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
