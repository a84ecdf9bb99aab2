"""Softmax weights: w_i = N·exp(ω_i/T) / Σ_j exp(ω_j/T), one logit per row (arXiv 2511.21056; SEAL, arXiv 2410.07471).

With `ExponentiatedGradient` on visited rows this is mirror descent on the simplex. The template to copy for a
new table: one function u. Left out: anything that shares information between rows; see `source` and `network`.
"""

from __future__ import annotations

from torch import Tensor

from lit_bilevel.weights.table import TableWeights


class SoftmaxWeights(TableWeights):
    """One weight per row, all of them competing for the same mass."""

    def log_unnormalised(self, logits: Tensor) -> Tensor:
        return logits
