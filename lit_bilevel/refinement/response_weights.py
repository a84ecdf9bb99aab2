"""Response weights: how much each generated token counts inside its row's group.

    ℓ̃_i = (1/G′)·Σ_g Σ_t r_gt·NLL_gt / L̄        ρ_t = π_θ(y_t | …) / π_old(y_t | …)        both at temperature T

r is always detached, and ρ comes from passes without dropout (arXiv 2511.21056; lit_bilevel/README.md 6.1). What a rule
does to the policy in expectation (6.3): with ρ = Π ρ_t unclipped, T = 1 and L̄ constant,
E_{y~π_old}[ρ·∇ℓ] ∝ −E_{π_θ}[∇ log π_θ] = 0, so own samples teach nothing on average; what moves the policy is what a
rule adds to that: clipping, a temperature τ, alignment with the validation gradient, and for every rule the dropping of
unfinished responses (towards short ones) and the learned weight of the group.

Left out: advantages from a reward model; validation gradients play that part here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem, RunningDirection, Values

DECAY = 0.9


@dataclass(frozen=True)
class Ratios:
    """Generated responses of a batch, as a rule sees them.

    Args:
        log_ratio_J: [J] log ρ_t of each generated token.
        response_J: [J] the response (0 … R−1) of each token.
        group_R: [R] the group (0 … groups−1) of each response.
        groups: number of groups, empty ones included.
        alignment_R: [R] ⟨d, ∇ℓ⟩ of each response, d the direction of the rule, where it asked for it.
        agreement_R: [R] how far each response agrees with the others to its question, with mean 1 over the responses of
            the round that are trained on.
    """

    log_ratio_J: Tensor
    response_J: Tensor
    group_R: Tensor
    groups: int
    alignment_R: Tensor | None = None
    agreement_R: Tensor | None = None

    @property
    def log_ratio_R(self) -> Tensor:
        """[R] log ρ of whole responses."""
        return self.sums(self.log_ratio_J)

    @property
    def length_R(self) -> Tensor:
        """[R] tokens of each response."""
        return self.sums(torch.ones_like(self.log_ratio_J))

    def sums(self, value_J: Tensor) -> Tensor:
        """[R] sums over the tokens of each response."""
        return value_J.new_zeros(len(self.group_R)).index_add(0, self.response_J, value_J)

    def group_sums(self, value_R: Tensor) -> Tensor:
        """[R] for each response the sum over its group."""
        return value_R.new_zeros(self.groups).index_add(0, self.group_R, value_R)[self.group_R]

    @property
    def alone_R(self) -> Tensor:
        """[R] whether a response is the only one of its group."""
        return self.group_sums(torch.ones_like(self.group_R)) == 1


class ResponseWeights(ABC):
    """Gives the detached weight r of every generated token."""

    needs_alignment: bool = False
    """Whether `alignment_R` is to be computed first (one more pass over generated rows)."""
    needs_agreement: bool = False
    """Whether a question needs several responses, to see how far they agree."""

    @abstractmethod
    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        """[J] weights r, and [J] whether each was clipped."""

    def direction(self, problem: BilevelProblem) -> Values:
        """What responses are to be aligned with in this step; asked once a step, of rules that need it."""
        raise NotImplementedError(f"`{type(self).__name__}` needs an alignment and has no `direction`.")

    @property
    def counted(self) -> int:
        """How many numbers `singles` returns."""
        return 2

    def singles(self, ratios: Ratios) -> Tensor:
        """[2] sum and number of what groups of one response are divided by, for `follow`; zeros if nothing is."""
        return ratios.log_ratio_J.new_zeros(2)

    def follow(self, sums: Tensor) -> None:  # noqa: B027  (most rules have no state)
        """Take in the `singles` of all processes and micro-batches of a policy step, after it."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` returned."""


def _clip(log_ratio: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    limit = math.log(clip)  # in logarithms, for the product over a long response overflows before it is clipped
    return log_ratio.clamp(-limit, limit).exp(), log_ratio.abs() > limit


def _check(clip: float) -> float:
    if clip <= 1:
        raise UserError(f"`clip` is {clip}; it must be above 1: ratios are kept in [1/clip, clip].")
    return clip


class UniformRatio(ResponseWeights):
    """r = 1. In expectation −∇E_{π_old}[log π_θ], which is 0 as a round begins and then holds the policy near π_old."""

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        return torch.ones_like(ratios.log_ratio_J), torch.zeros_like(ratios.log_ratio_J, dtype=torch.bool)


class TokenRatio(ResponseWeights):
    """r_t = ρ_t, clipped: the authors' rule. The expected update given each prefix vanishes, but prefixes stay those
    of π_old; clipping from above slows what the policy already gained on.

    Args:
        clip: ratios are kept in [1/clip, clip].
    """

    def __init__(self, clip: float = 10.0):
        self.clip = _check(clip)

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        return _clip(ratios.log_ratio_J, self.clip)


class SequenceRatio(ResponseWeights):
    """r = Π_t ρ_t, clipped. Unbiased until it clips, so the expected update is 0; its variance grows with length.

    Args:
        clip: ratios are kept in [1/clip, clip].
    """

    def __init__(self, clip: float = 10.0):
        self.clip = _check(clip)

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        weight_R, clipped_R = _clip(ratios.log_ratio_R, self.clip)
        return weight_R[ratios.response_J], clipped_R[ratios.response_J]


class LengthNormalised(ResponseWeights):
    """r = (Π_t ρ_t)^{1/length}, clipped: the geometric mean. Biased towards `UniformRatio`, hardly any variance.

    Args:
        clip: ratios are kept in [1/clip, clip].
    """

    def __init__(self, clip: float = 10.0):
        self.clip = _check(clip)

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        weight_R, clipped_R = _clip(ratios.log_ratio_R / ratios.length_R, self.clip)
        return weight_R[ratios.response_J], clipped_R[ratios.response_J]


class _Relative(ResponseWeights):
    """Scores ≥ 0 divided by their mean in the group; those of a lone response by a running mean of earlier steps.

    The running mean, of scores above 0, takes in a step only after it, so that micro-batches of a step change nothing;
    before there is one, a lone response with a score above 0 counts 1. It is one running sum by another, both from 0,
    so the first step counts no more than any other.

    Args:
        most: largest weight of a lone response.
    """

    def __init__(self, most: float = math.inf) -> None:
        self._sum = self._count = 0.0
        self._most = most

    @property
    def mean(self) -> float | None:
        """The running mean of lone scores, if any was seen."""
        return self._sum / self._count if self._count > 0 else None

    @abstractmethod
    def score(self, ratios: Ratios) -> Tensor:
        """[R] scores, at least 0."""

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        score_R = self.score(ratios)
        sum_R = ratios.group_sums(score_R)
        count_R = ratios.group_sums(torch.ones_like(score_R))
        mean_R = sum_R / count_R
        if self.mean is not None:
            mean_R = torch.where(ratios.alone_R, torch.full_like(mean_R, self.mean), mean_R)
        weight_R = torch.where(sum_R > 0, score_R / mean_R.clamp_min(torch.finfo(mean_R.dtype).tiny), 0.0)
        clipped_R = ratios.alone_R & (weight_R > self._most)
        weight_R = torch.where(clipped_R, self._most, weight_R)
        return weight_R[ratios.response_J], clipped_R[ratios.response_J]

    def singles(self, ratios: Ratios) -> Tensor:
        score_R = self.score(ratios)
        counted_R = ratios.alone_R & (score_R > 0)
        return torch.stack([(score_R * counted_R).sum(), counted_R.sum()])

    def follow(self, sums: Tensor) -> None:
        total, count = sums.tolist()
        if count > 0 and math.isfinite(total):  # one overflow would stay in the mean for good
            self._sum = DECAY * self._sum + total
            self._count = DECAY * self._count + count

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._count = state["sum"], state["count"]


class SelfNormalised(_Relative):
    """r ∝ ρ^{1/τ} over the group, mean 1: BMO online. At τ = 1 the expected update vanishes up to O(1/G); τ < 1 favours
    what the policy gained on since the round began (its mode sharpens), τ > 1 approaches `UniformRatio`.

    Args:
        tau: temperature τ of the weights.
        limit: largest |log ρ|/τ, so that a lone response cannot overflow.
    """

    def __init__(self, tau: float = 1.0, limit: float = 20.0):
        super().__init__()
        if tau <= 0:
            raise UserError(f"`tau` is {tau}; it must be above 0.")
        self.tau, self.limit = tau, limit

    def score(self, ratios: Ratios) -> Tensor:
        scaled_R = ratios.log_ratio_R / self.tau
        top_B = scaled_R.new_full((ratios.groups,), -torch.inf).scatter_reduce(0, ratios.group_R, scaled_R, "amax")
        # less the largest of the group, as in any softmax; a lone response is compared with earlier ones by its size
        shift_R = torch.where(ratios.alone_R, 0.0, top_B[ratios.group_R])
        return (scaled_R - shift_R).clamp(-self.limit, self.limit).exp()


class Aligned(_Relative):
    """r ∝ max(0, ⟨d, ∇ℓ⟩) over the group, mean 1: the closed form of L2RW (arXiv 1803.09050) on generations, d the
    running mean of ∇f over the steps since the first round, as `OneStep` keeps one. Moves the policy towards those of
    its responses whose imitation lowers the validation loss; a group without one counts 0.

    Args:
        clip: largest r of a response that is alone in its group, and so compared with those of earlier steps.
        direction_decay: decay of the running mean; 0 uses the gradient of the step alone, which is mostly noise.
        preconditioned: scale the direction by the second moments of the policy's optimizer, as its own step would.
    """

    needs_alignment = True

    def __init__(self, clip: float = 10.0, direction_decay: float = 0.99, preconditioned: bool = True):
        super().__init__(_check(clip))
        if not 0 <= direction_decay < 1:
            raise UserError(f"`direction_decay` is {direction_decay}; it must be in [0, 1).")
        self.clip, self.direction_decay, self.preconditioned = clip, direction_decay, preconditioned
        self._running = RunningDirection(direction_decay, preconditioned)

    def direction(self, problem: BilevelProblem) -> Values:
        self._running.take(problem.upper_gradient())
        return self._running.mean(problem)

    def score(self, ratios: Ratios) -> Tensor:
        assert ratios.alignment_R is not None
        return ratios.alignment_R.clamp_min(0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._running.load_state_dict(state if "average" in state else {})
