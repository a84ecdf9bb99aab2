"""One logit per pool row: w_i = N·p_i·u(ω_i) / Σ_j p_j·u(ω_j) for a positive function u. The base of `softmax` and
`sigmoid`. p is the prior, at which the weights begin, for all logits are 0 at the start; below, u stands for p·u.

The gradient is sparse, the idiom of `nn.Embedding(sparse=True)`: rows outside the batch are left alone, which keeps the
learned order from following the order of visits (lit_bilevel/README.md 2.4). Σu, Σu² and Σu·log u are kept in float64
and updated from the visited rows, so a step costs the same at any N, and the mean is 1 after every step.

Limits, all of which keep the mean at 1:

    cap     u ← min(u, t), with t such that the largest weight is `cap`      t is set at the end of an epoch
    keep    u ← 0 below a threshold, above which a share `keep` of rows lies   the threshold, too
    floor   w ← (1 − floor)·w + floor                                          exact at every step

Between two epoch ends, cap and keep hold approximately, the mean exactly. A row that is gated out goes on receiving
scores, so it can come back. Left out: momentum, and logits that rows share.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lit_bilevel.errors import UserError, gather
from lit_bilevel.types import Features
from lit_bilevel.weights.base import CUT, FLOOR, TINY, ExampleWeights, centre

TIE = 0.01  # rows whose log u is this close count as equal, or rounding noise would decide whom the gate drops


class TableWeights(ExampleWeights):
    """One weight per row.

    Args:
        temperature: divides the logits; higher is more even.
        kl_to_prior: strength of the pull towards the prior, in units of the scaled score.
        floor: least weight of any row.
        cap: largest weight of any row.
        keep: share of rows, from the top, that keep a weight above 0; begins after the first epoch.
    """

    sparse = True
    by_row = ExampleWeights.by_row | {"logits"}

    logits: nn.Parameter
    sums: Tensor
    shift: Tensor
    log_ceiling: Tensor
    log_threshold: Tensor

    def __init__(
        self,
        temperature: float = 1.0,
        kl_to_prior: float = 0.0,
        floor: float = 0.0,
        cap: float | None = None,
        keep: float = 1.0,
    ) -> None:
        super().__init__(kl_to_prior)
        self.temperature, self.floor, self.cap, self.keep = temperature, floor, cap, keep
        self._check_settings()
        limits = {"shift": 0.0, "log_ceiling": math.inf, "log_threshold": -math.inf}
        for name, value in limits.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def _check_settings(self) -> None:
        problems = []
        if self.temperature <= 0:
            problems.append(f"`temperature` is {self.temperature}; it must be above 0")
        if not 0 <= self.floor < 1:
            problems.append(f"`floor` is {self.floor}; it must be in [0, 1)")
        if not 0 < self.keep <= 1:
            problems.append(f"`keep` is {self.keep}; it must be in (0, 1]")
        elif self.cap is not None and self.cap <= 1 / self.keep:
            problems.append(f"`cap` is {self.cap}; for a mean of 1 it must be above 1 / `keep` = {1 / self.keep:g}")
        if self.keep < 1 and self.floor > 0:
            problems.append("`floor` gives every row a weight and `keep` takes it away; set one of them")
        if problems:
            raise gather(f"bad settings of `{type(self).__name__}`", problems)

    @abstractmethod
    def log_unnormalised(self, logits: Tensor) -> Tensor:
        """log u(ω), elementwise, of logits in float64 that were divided by the temperature."""

    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        self.logits = nn.Parameter(torch.zeros(len(source_N), dtype=dtype, device=self.sums.device))
        self._recount(self._free(slice(None)))

    # ---- u ----

    def _free(self, rows: Tensor | slice) -> Tensor:
        # float64, as sums of it are kept by adding differences over a whole epoch
        return self.log_unnormalised(self.logits.detach()[rows].double() / self.temperature) + self.log_prior_N[rows]

    def _limit(self, log_u: Tensor) -> Tensor:
        if self.keep < 1:
            log_u = log_u.masked_fill(log_u < self.log_threshold, -math.inf)
        return log_u if self.cap is None else log_u.clamp_max(self.log_ceiling)

    def _log_u(self, rows: Tensor | slice) -> Tensor:
        return self._limit(self._free(rows)) - self.shift

    @staticmethod
    def _sums(log_u: Tensor) -> Tensor:
        u = log_u.exp()
        return torch.stack([u.sum(), (u * u).sum(), torch.xlogy(u, u).sum()])

    def _floor(self, weights: Tensor) -> Tensor:
        return weights if self.floor == 0 else (1 - self.floor) * weights + self.floor

    # ---- the socket ----

    def weigh(self, features: Features) -> Tensor:
        # O(batch): the sum over all rows is kept by `after_step` and not computed here
        u_B = self._log_u(features.row_B.clamp_min(0)).exp()
        return self._floor(u_B * (self.pool_rows / self.sums[0])).to(self.logits.dtype)

    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        # a refined window may hold a row twice; the sums hold every row once
        rows = features.row_B.sort().values
        again = torch.cat([rows.new_zeros(1, dtype=torch.bool), rows[1:] == rows[:-1]])  # counts once
        self._pending = (rows, again, self._sums_once(rows, again))
        # a dense gradient would have N numbers, and its zeros would be steps for an optimizer with momentum; to check
        # the indices would wait for the device
        self.logits.grad = torch.sparse_coo_tensor(
            features.row_B[None], score_B.to(self.logits.dtype), self.logits.shape, check_invariants=False
        )

    def after_step(self) -> None:
        if self._pending is not None:
            rows, again, before = self._pending
            self.sums += self._sums_once(rows, again) - before
            self._pending = None

    def _sums_once(self, rows: Tensor, again: Tensor) -> Tensor:
        return self._sums(self._log_u(rows).masked_fill(again, -math.inf))

    def recount(self) -> None:
        log_u = self._free(slice(None))
        if self.keep < 1:
            gated = len(log_u) - math.ceil(self.keep * len(log_u))
            self.log_threshold.copy_(log_u.kthvalue(gated + 1).values - TIE)
        self._recount(log_u)

    def _recount(self, log_u: Tensor) -> None:
        """Set the ceiling, then sum over all rows."""
        if self.cap is not None:
            self.log_ceiling.fill_(math.inf)  # the old ceiling would hide what lies above it
            self.log_ceiling.copy_(_ceiling(self._limit(log_u), self.cap))
        log_u = self._limit(log_u)
        self.shift.copy_(log_u.max())
        self.sums.copy_(self._sums(log_u - self.shift))

    def table(self) -> Tensor:
        u = self._log_u(slice(None)).exp()
        # by its own sum, for the one that is kept has the rounding of an epoch's steps
        return self._floor(u * (len(u) / u.sum()))

    def set_prior(self, weight_N: Tensor) -> None:
        if self.floor > 0:  # it is added again, by `_floor`
            weight_N = (weight_N / weight_N.double().mean() - self.floor).clamp_min(0)
        super().set_prior(weight_N)

    def settle(self, s_N: Tensor, strength: float) -> None:
        """Set all logits at once from scores of the whole pool: ω_i = −T·(s_i − b) / (strength·c), cut as in a step.

        For softmax weights, w ∝ p·exp(−(s − b)/(strength·c)), where steps with `kl_to_prior` = strength come to rest,
        except that b and c are taken under the prior. A row whose score is not finite stays at its prior.

        Args:
            s_N: [N] a solver's score of every row, at one and the same state of the policy.
            strength: ρ > 0; smaller moves the weights further from the prior.

        Raises:
            UserError: for a strength that is not above 0.
        """
        if strength <= 0:
            raise UserError(f"the strength is {strength}; it must be above 0.")
        valid_N = torch.isfinite(s_N)
        p_N = self.log_prior_N.double().exp() * valid_N
        s_N = torch.where(valid_N, s_N.to(p_N), 0.0)
        centred_N = centre(s_N, p_N) * valid_N
        rows = valid_N.sum().clamp_min(1)
        scale = (torch.maximum(centred_N.abs().sum(), FLOOR * s_N.abs().sum()) / rows).clamp_min(TINY)
        with torch.no_grad():
            self.logits.copy_((centred_N / scale).clamp(-CUT, CUT) * (-self.temperature / strength))
        self.recount()

    def statistics(self) -> dict[str, Tensor]:
        total, squares, u_log_u = self.sums
        kept = 1 - self.floor
        rows = self.pool_rows
        mean_square = kept**2 * rows * squares / total**2 + 1 - kept**2
        entropy = {"entropy": total.log() - u_log_u / total} if self.floor == 0 else {}
        return {"effective_size": rows / mean_square, **entropy}


def _ceiling(log_u: Tensor, cap: float) -> Tensor:
    """log t such that N·min(u, t) / Σ min(u, t) is at most `cap`, with equality where any u is above t.

    With the k largest u at t, t = cap·(Σ of the others) / (N − cap·k); the right k is the first whose next u fits.
    """
    rows = len(log_u)
    log_u = log_u.sort(descending=True).values
    log_others = log_u.flip(0).logcumsumexp(0).flip(0)[: math.ceil(rows / cap)]
    capped = torch.arange(len(log_others), dtype=log_u.dtype, device=log_u.device)
    candidates = log_others + math.log(cap) - (rows - cap * capped).log()
    first = (log_u[: len(candidates)] <= candidates).int().argmax()
    return candidates[first]
