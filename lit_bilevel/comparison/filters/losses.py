"""Filters by the loss of a row, under the policy before training or against one that knows the validation rows.

    LowestLoss             −ℓ_i(θ₀)                     θ₀ the policy before training
    HighestLoss             ℓ_i(θ₀)
    PerplexityDifference    ℓ_i(θ₀) − ℓ_i(θ_v)          θ_v tuned on the validation rows (Moore and Lewis, 2010)

Left out: losses during training, which a bilevel run weighs by itself.
"""

from __future__ import annotations

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence


class LowestLoss(Filter):
    """What the policy finds easy before it is trained."""

    def scores(self, evidence: Evidence) -> np.ndarray:
        return -evidence.losses()


class HighestLoss(Filter):
    """What the policy finds hard before it is trained."""

    def scores(self, evidence: Evidence) -> np.ndarray:
        return evidence.losses()


class PerplexityDifference(Filter):
    """What a policy tuned on the validation rows finds easier than the policy it was tuned from."""

    needs = "validation_only"

    def scores(self, evidence: Evidence) -> np.ndarray:
        return evidence.losses() - evidence.losses(tuned=True)
