"""Normalised sigmoid weights: w_i = N·σ(ω_i/T) / Σ_j σ(ω_j/T), one logit per row.

The ratio of two weights is bounded above by that of σ, so no row can take all the mass as fast as under softmax.
A plain 2σ(ω) is left out: its mean is not 1, and it collapses under any solver whose scores are positive.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_bilevel.weights.table import TableWeights


class SigmoidWeights(TableWeights):
    """One weight per row that saturates at the top."""

    def log_unnormalised(self, logits: Tensor) -> Tensor:
        return logsigmoid(logits)
