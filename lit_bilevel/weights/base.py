"""The socket for data weights: features of pool rows in, weights of mean 1 out.

Every weighting receives the same centred and scaled score,

    (s_i − b) / c      b = Σ_B w_i s_i / Σ_B w_i      c = max(EMA|s − b|, 1e-3 · EMA|s|), decay 0.99, bias-corrected

over the global batch, cut at ±3. Without b, all scores drifting together would spread the weights by order of visit;
without the floor in c, the rounding noise of equal scores would be blown up; without the cut, the first steps of a
policy optimizer whose moments are still poor decide single rows for good (measured on the toy task: effective size 2 %
of the pool without, 43 % with). b and c are computed in float64 and checkpointed. A row with a score that is not finite
is left alone, without asking the device.

Weights begin at a **prior** p_i, equal for all rows unless `set_prior` says more (a score of the untouched policy, a
density ratio, the weights of an earlier run), and what is learned multiplies it: w_i ∝ p_i·u_i with u = 1 at the start.
For example, a row with prior 0.5 that learning makes three times heavier than the others weighs 1.5 times as much.

With `kl_to_prior` ρ the objective gains ρ·Σ_i (w_i/N)·log(w_i/p_i): a row's scaled score gains ρ·log(w_i/p_i), centred
in the same way, and the weights settle at w ∝ p·exp(−(s − b)/(ρ·c)) where they would otherwise run to the best row.

Left out: weights that depend on the policy's hidden states; they would need the policy inside the weighting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features

DECAY = 0.99
FLOOR = 1e-3
TINY = torch.finfo(torch.float64).tiny
CUT = 3.0
SMALLEST_LOG_WEIGHT = -20.0


class ExampleWeights(nn.Module, ABC):
    """Maps features of pool rows to their data weights: at least 0, mean 1 over the pool.

    A subclass implements `create`, `weigh`, `assign_gradient` and `table`; `TableWeights` and `RunningWeights` do most
    of that. Parameters and buffers keep their precision whatever the policy is cast to, and stay whole everywhere.

    Args:
        kl_to_prior: strength ρ of the pull towards the prior, in units of the scaled score; without a prior, towards
            equal weights.
    """

    learnable: bool = True
    """Whether a solver's scores change these weights."""
    needs_loss: bool = False
    """Whether `weigh` reads `features.loss_B`."""
    needs_scoring: bool = False
    """Whether `table` is right only after `score` saw every row under the final policy."""
    needs_upper_weight: bool = False
    """Whether the weights learn about validation only through a policy that trains on it (λ > 0)."""
    sparse: bool = False
    """Whether the gradient is sparse, and an optimizer that moves rows without one spoils the order."""
    columns: tuple[str, ...] = ()
    """Names of the scores that the weights read of every row; `set_columns` gives them."""
    by_row: frozenset[str] = frozenset({"visits", "log_prior_N"})
    """Parameters and buffers [N] of which a step changes the visited rows only; `Undo` copies all others whole."""

    spread_average: Tensor
    score_average: Tensor
    updates: Tensor
    visits: Tensor
    log_prior_N: Tensor

    def __init__(self, kl_to_prior: float = 0.0) -> None:
        super().__init__()
        if kl_to_prior < 0:
            raise UserError(f"`kl_to_prior` is {kl_to_prior}; it must be at least 0.")
        self.kl_to_prior = kl_to_prior
        # float64, as they run through the whole run: float32 would round small changes of them away
        for name in ("spread_average", "score_average", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("visits", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("log_prior_N", torch.zeros(0))
        self.dtype = torch.float32

    @property
    def pool_rows(self) -> int:
        """N; 0 before `build`."""
        return len(self.visits)

    def build(self, source_N: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Take the shape of a pool; `source_N` and `dtype` as in `create`."""
        self.visits = torch.zeros(len(source_N), dtype=torch.int32, device=self.updates.device)
        self.log_prior_N = torch.zeros(len(source_N), device=self.updates.device)
        self.dtype = dtype
        self.create(source_N, dtype)

    @abstractmethod
    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        """Make the parameters for a pool.

        Args:
            source_N: [N] source number of every row.
            dtype: float32, or float64 where the run is in double precision.
        """

    @abstractmethod
    def weigh(self, features: Features) -> Tensor:
        """[B] weights of the rows in `features`."""

    @abstractmethod
    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        """Put the gradient of mean_i w_i · score_i on the parameters, given centred and scaled scores [B], float64."""

    @abstractmethod
    def table(self) -> Tensor:
        """[N] weights of all rows, float64; a row never visited has the initial value, normalised."""

    def check_pool(self) -> None:
        """Refuse, with a `UserError`, a pool on which these weights could learn nothing; `build` takes any."""

    def statistics(self) -> dict[str, Tensor]:
        """Cheap scalars for logging every step, from running sums: no work that grows with N."""
        return {}

    def score(self, features: Features) -> None:
        """Take the losses of rows under the final policy; where `needs_scoring`, every row comes by before `table`."""

    def set_prior(self, weight_N: Tensor) -> None:
        """Begin at these weights instead of at equal ones; call it between `build` and the first step.

        Args:
            weight_N: [N] weights, at least 0; what counts is their ratios, down to e⁻²⁰ of the largest.

        Raises:
            UserError: for numbers that are not finite or below 0, another count than N, or nothing above 0.
        """
        weight_N = weight_N.to(self.log_prior_N.device, torch.float64)
        if weight_N.shape != self.log_prior_N.shape:
            raise UserError(f"the prior has {len(weight_N)} weights for {self.pool_rows} pool rows; give one a row.")
        if not (weight_N.isfinite().all() and (weight_N >= 0).all() and weight_N.max() > 0):
            raise UserError(
                "the prior has weights that are not finite, below 0, or all 0; give finite ones, some above 0."
            )
        # a weight of 0 would have the logarithm −∞, from which no step could bring a row back
        log_N = (weight_N / weight_N.max()).log().clamp_min(SMALLEST_LOG_WEIGHT)
        self.log_prior_N.copy_(log_N - log_N.exp().mean().log())
        self.recount()

    def set_columns(self, table_NF: Tensor) -> None:
        """Take the scores that are named in `columns`; call it between `build` and the first step.

        Args:
            table_NF: [N, F] scores of the rows, each of about mean 0 and standard deviation 1.

        Raises:
            UserError: where these weights read none.
        """
        raise UserError(f"`{type(self).__name__}` read no scores of rows; use `NetworkWeights` with `columns`.")

    def log_prior(self, features: Features) -> Tensor:
        """[B] log p of the rows in `features`, float64; p has mean 1 over the pool."""
        return self.log_prior_N[features.row_B.clamp_min(0)].double()

    def recount(self) -> None:
        """Recompute running sums exactly; called at epoch ends, may take O(N)."""

    def after_step(self) -> None:
        """Bring running sums up to date after the weight optimizer's step; O(batch)."""

    def forward(self, features: Features) -> Tensor:
        """[B] weights, detached, 0 for padding.

        Raises:
            ValueError: if `weigh` returns another shape.
        """
        # without a graph: scores are all that the weights learn from, and the policy's own loss would teach them to put
        # their mass on rows that are easy
        with torch.no_grad():
            weight_B = self.weigh(features)
        if weight_B.shape != features.row_B.shape:
            raise ValueError(
                f"`{type(self).__name__}.weigh` returned shape {tuple(weight_B.shape)} for {len(features.row_B)} rows;"
                " it must return one weight a row."
            )
        return weight_B * (features.row_B >= 0)

    def observe(self, features: Features) -> None:
        """Take note of a policy step: once a step, with the rows and losses of all processes, without padding."""
        self.visits.index_add_(0, features.row_B, torch.ones_like(features.row_B, dtype=torch.int32))

    def set_gradient(self, features: Features, s_B: Tensor) -> None:
        """Centre and scale a solver's scores, then put the gradient on the parameters.

        Args:
            features: the rows of the global batch, without padding.
            s_B: [B] the solver's s_i = N·∂F/∂w_i.

        Raises:
            UserError: for a batch of one row, which has no baseline.
        """
        if len(s_B) < 2:
            raise UserError(
                "the global batch has one row, so its score has no baseline to be compared with;"
                " set `data.batch_size` (or `model.accumulate_grad_batches`) so that a step sees at least 2 rows."
            )
        # dF/dω_k = p_k·(s_k − Σ_j p_j·s_j): b is what the window knows of that sum, under the weights before the step.
        # Rows are masked and never taken out, for a shape that depends on numbers would wait for the device.
        w_B = self(features).double()
        valid_B = torch.isfinite(s_B) & torch.isfinite(w_B)
        s_B = torch.where(valid_B, s_B.double(), 0.0)
        w_B = torch.where(valid_B, w_B + TINY, 0.0)  # rows that all weigh 0 have the plain mean as their baseline
        centred_B = centre(s_B, w_B) * valid_B
        score_B = (centred_B / self._scale(s_B, centred_B, valid_B)).clamp(-CUT, CUT)
        if self.kl_to_prior > 0:
            moved_B = w_B.clamp_min(TINY).log() - self.log_prior(features)
            # a row that weighs next to nothing is pulled as one of e⁻²⁰, or it alone would make the mean
            pull_B = centre(moved_B.clamp_min(SMALLEST_LOG_WEIGHT), w_B)
            score_B = score_B + self.kl_to_prior * pull_B * valid_B
        self.assign_gradient(features, score_B)

    def _scale(self, s_B: Tensor, centred_B: Tensor, valid_B: Tensor) -> Tensor:
        """c, after it has taken in a step; one without two rows to compare, or whose scores are all 0, is none.

        Such a step says nothing of how large scores are, and would blow up those of the next ones: (k + 1)-fold after
        k steps.
        """
        rows = valid_B.sum()
        counts = ((rows > 1) & (s_B != 0).any()).double()
        rate = (1 - DECAY) * counts  # 0 leaves the averages as they are, without asking the device
        self.updates += counts
        self.spread_average.lerp_(centred_B.abs().sum() / rows.clamp_min(1), rate)
        self.score_average.lerp_(s_B.abs().sum() / rows.clamp_min(1), rate)
        # equal scores differ by rounding, 1e-4 of their size or less, which must not be scaled up to whole steps
        average = torch.maximum(self.spread_average, FLOOR * self.score_average)
        return (average / (1 - DECAY**self.updates).clamp_min(TINY)).clamp_min(TINY)

    def _apply(self, fn, recurse: bool = True):
        """Follow the module to a device, never to another precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def effective_size(weight_N: Tensor) -> float:
    """(Σw)²/Σw²: how many rows of equal weight would vary as little in their mean."""
    return float(weight_N.sum() ** 2 / (weight_N**2).sum())


def centre(values_B: Tensor, w_B: Tensor) -> Tensor:
    """Values less their weighted mean."""
    return values_B - (w_B * values_B).sum() / w_B.sum().clamp_min(TINY)
