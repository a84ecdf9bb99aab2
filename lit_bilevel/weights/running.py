"""Weights that are a function of a row's features, p·u/Ẑ, with a running normaliser. The base of `bmo` and `network`.

    log Z ← logaddexp(log β + log Z, log(1−β) + log mean_B p·u)      Ẑ = Z / (1 − βⁿ)      w_i = p_i·u_i / Ẑ

The mean of p·u over the pool cannot be had from a batch, so Z runs along in float64, once per policy step, over the
rows of all processes. That way neither accumulation nor the number of processes changes anything. Z starts at 0 and is
corrected for it after n windows: started at the first window it would remember that one for hundreds of steps, while
losses fall and u grows. Before any window a row weighs its prior.

The features last seen of each row are kept, so `table` is exact (mean 1) for what is known; but losses last seen are
ordered by visit, so an export scores every row under the final policy first.

Left out: a second forward pass that would normalise every window exactly.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.base import ExampleWeights

CHUNK = 1 << 20
STATISTICS_DECAY = 0.9


class RunningWeights(ExampleWeights):
    """A weight for every row that shows its loss, seen before or not.

    Args:
        kl_to_prior: as in `ExampleWeights`.
        decay: β of the running normaliser.
    """

    needs_loss = True
    needs_scoring = True
    by_row = ExampleWeights.by_row | {"loss_N", "length_N", "source_N"}

    log_average: Tensor
    moments: Tensor
    windows: Tensor
    loss_N: Tensor
    length_N: Tensor
    source_N: Tensor

    def __init__(self, kl_to_prior: float = 0.0, decay: float = 0.99) -> None:
        super().__init__(kl_to_prior)
        if not 0 <= decay < 1:
            raise UserError(f"`decay` is {decay}; it must be in [0, 1).")
        self.decay = decay
        self.register_buffer("log_average", torch.full((), -math.inf, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("windows", torch.zeros((), dtype=torch.float64))
        for name in ("loss_N", "length_N", "source_N"):
            self.register_buffer(name, torch.zeros(0))

    @abstractmethod
    def log_unnormalised(self, features: Features) -> Tensor:
        """log u of the rows in `features`, [B], float64."""

    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        device = self.log_average.device
        self.loss_N = torch.full((len(source_N),), math.nan, dtype=dtype, device=device)
        self.length_N = torch.zeros(len(source_N), dtype=torch.int32, device=device)
        self.source_N = source_N.to(device, torch.int32)

    @property
    def log_normaliser(self) -> Tensor:
        """log Ẑ; NaN before the first window."""
        return self.log_average - (1 - self.decay**self.windows).log()

    def weigh(self, features: Features) -> Tensor:
        prior_B = self.log_prior(features)
        log_w_B = torch.where(self.windows > 0, self.log_unnormalised(features) - self.log_normaliser, 0.0) + prior_B
        return log_w_B.exp().to(self.loss_N.dtype)

    def observe(self, features: Features) -> None:
        super().observe(features)
        self.score(features)
        with torch.no_grad():
            log_u_B = self.log_unnormalised(features) + self.log_prior(features)
        valid_B = torch.isfinite(log_u_B)
        any_valid = valid_B.any()
        # such rows have no part in the mean, and a window without any other moves nothing; all by masks, for an `if`
        # would wait for the device
        log_u_B = log_u_B.masked_fill(~valid_B, -math.inf)
        log_mean = log_u_B.logsumexp(0) - valid_B.sum().log()
        rate = torch.full_like(log_mean, 1 - self.decay)
        moved = torch.logaddexp((1 - rate).log() + self.log_average, rate.log() + log_mean)
        self.log_average.copy_(torch.where(any_valid, moved, self.log_average))
        self.windows += any_valid
        w_B = (log_u_B - self.log_normaliser).exp()
        now = torch.stack([w_B.sum(), (w_B * w_B).sum(), torch.xlogy(w_B, w_B).sum()]) / valid_B.sum()
        moments = torch.lerp(self.moments, now, 1 - STATISTICS_DECAY)
        self.moments.copy_(torch.where(any_valid, moments, self.moments))

    def score(self, features: Features) -> None:
        assert features.loss_B is not None
        rows, loss_B = features.row_B, features.loss_B.to(self.loss_N.dtype)
        # the last finite one: an overflow says nothing of a row
        self.loss_N[rows] = torch.where(loss_B.isfinite(), loss_B, self.loss_N[rows])
        self.length_N[rows] = features.length_B.to(torch.int32)

    @torch.no_grad()
    def table(self) -> Tensor:
        """[N] weights from the features last seen; rows not seen yet weigh 1."""
        # in parts, for a network's hidden layer over all rows at once would not fit into memory
        log_u = torch.cat([self._recall(start) for start in range(0, self.pool_rows, CHUNK)])
        seen = ~self.loss_N.isnan()
        share_N = torch.softmax(log_u.masked_fill(~seen, -math.inf), 0) if seen.any() else torch.zeros_like(log_u)
        return torch.where(seen, share_N * seen.sum(), torch.ones_like(share_N))

    def _recall(self, start: int) -> Tensor:
        rows = torch.arange(start, min(start + CHUNK, self.pool_rows), device=self.loss_N.device)
        loss_B = self.loss_N[rows].nan_to_num()
        features = Features(rows, self.source_N[rows].long(), self.length_N[rows].long(), loss_B)
        return self.log_unnormalised(features) + self.log_prior(features)

    def statistics(self) -> dict[str, Tensor]:
        """From running means over the last ten windows or so of w, w² and w·log w."""
        equal = torch.tensor([1.0, 1.0, 0.0], dtype=self.moments.dtype, device=self.moments.device)
        known = self.moments / (1 - STATISTICS_DECAY**self.windows)
        mean, square, w_log_w = torch.where(self.windows > 0, known, equal)
        return {
            "effective_size": self.pool_rows * mean**2 / square,
            "entropy": math.log(self.pool_rows) + mean.log() - w_log_w / mean,
        }
