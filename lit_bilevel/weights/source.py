"""Weights per source: w_k = exp(ω_k/T) / Σ_j (N_j/N)·exp(ω_j/T), one logit per value of the `source` column.

Source: ScaleBiO (arXiv 2406.19976), DoReMi (2305.10429). A source's score is the mean over its rows in the batch. Few
numbers, so little noise; rows of one source are never told apart. Left out: a source that changes during a run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.base import TINY, ExampleWeights


class SourceWeights(ExampleWeights):
    """One weight per source, the same for all its rows.

    Args:
        temperature: divides the logits; higher is more even.
        kl_to_prior: strength of the pull towards the prior, in units of the scaled score.
    """

    by_row = ExampleWeights.by_row | {"source_N"}

    logits: nn.Parameter
    source_N: Tensor
    share_of_source: Tensor
    log_prior_of_source: Tensor

    def __init__(self, temperature: float = 1.0, kl_to_prior: float = 0.0) -> None:
        super().__init__(kl_to_prior)
        if temperature <= 0:
            raise UserError(f"`temperature` is {temperature}; it must be above 0.")
        self.temperature = temperature
        self.register_buffer("source_N", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("share_of_source", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("log_prior_of_source", torch.zeros(0, dtype=torch.float64))

    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        count = torch.bincount(source_N)
        self.source_N = source_N.to(self.source_N.device, torch.int32)
        self.share_of_source = (count.double() / len(source_N)).to(self.share_of_source.device)
        self.log_prior_of_source = torch.zeros_like(self.share_of_source)
        self.logits = nn.Parameter(torch.zeros(len(count), dtype=dtype, device=self.source_N.device))

    def set_prior(self, weight_N: Tensor) -> None:
        """As in `ExampleWeights`; a source takes the mean over its rows."""
        super().set_prior(weight_N)
        total = torch.zeros_like(self.share_of_source)
        total.index_add_(0, self.source_N.long(), self.log_prior_N.double().exp())
        mean = total / (self.share_of_source * self.pool_rows).clamp_min(1)
        self.log_prior_of_source = mean.clamp_min(TINY).log()
        self.log_prior_N.copy_(self.log_prior_of_source[self.source_N.long()])

    def check_pool(self) -> None:
        if (self.share_of_source > 0).sum() < 2:
            raise UserError(
                "the pool has one source, so `SourceWeights` has nothing to weigh; add a `source` column to the pool,"
                " or use `SoftmaxWeights`."
            )

    def _per_source(self) -> Tensor:
        log_u = self.logits.detach().double() / self.temperature + self.log_prior_of_source
        share = torch.softmax(log_u + self.share_of_source.log(), 0)
        return torch.where(self.share_of_source > 0, share / self.share_of_source, 1.0)

    def weigh(self, features: Features) -> Tensor:
        return self._per_source()[features.source_B.clamp_min(0)].to(self.logits.dtype)

    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        total = torch.zeros_like(self.share_of_source).index_add_(0, features.source_B, score_B)
        count = torch.bincount(features.source_B, minlength=len(total))
        # the mean, or a source with many rows in the window would step further than it should
        self.logits.grad = (total / count.clamp_min(1)).to(self.logits.dtype)

    def table(self) -> Tensor:
        return self._per_source()[self.source_N.long()]

    def statistics(self) -> dict[str, Tensor]:
        weights, rows = self._per_source(), float(self.pool_rows)
        entropy = torch.tensor(rows, dtype=torch.float64).log() - (self.share_of_source * weights * weights.log()).sum()
        return {"effective_size": rows / (self.share_of_source * weights**2).sum(), "entropy": entropy}
