"""Supervised fine-tuning: the mean NLL per response token, ℓ_i = Σ_k scale_k · NLL_k (arXiv 2511.21056).

Of a preference pair the chosen answer counts, for the tokens of the rejected one have scale 0.
Left out: what changes the meaning of the weights, such as label smoothing.
"""

from __future__ import annotations

from torch import Tensor

from lit_bilevel.losses import example_nll
from lit_bilevel.objectives.base import Objective
from lit_bilevel.types import Batch


class SFT(Objective):
    """Learns the response (of a pair, the chosen one)."""

    def losses(self, nll_K: Tensor, batch: Batch) -> Tensor:
        return example_nll(nll_K, batch)
