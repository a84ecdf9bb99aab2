"""Gradient similarity: rows whose loss gradient points where that of the validation rows points.

    score_i = cos(∇ℓ_i, Σ_v ∇ℓ_v / ‖∇ℓ_v‖)          gradients of an adapter, at the policy tuned on the pool

The idea is that of LESS (arXiv 2402.04333). A policy that is tuned whole gets an adapter of rank 8 for the scoring; at
its start that adapter's gradient is a random projection of the full one. Gradients are taken row by row and never
stored. Left out: several checkpoints, and the scaling of the pool's gradients by Adam's moments.
"""

from __future__ import annotations

import numpy as np
import torch

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.policy.load import LoraSettings

ADAPTER = LoraSettings(r=8, alpha=8)


class GradientSimilarity(Filter):
    """Cosine with the mean direction of the validation rows' gradients."""

    needs = "pool_only"

    def scores(self, evidence: Evidence) -> np.ndarray:
        with torch.random.fork_rng():
            torch.manual_seed(evidence.seed)
            policy = evidence.policy(tuned=True, adapter=ADAPTER)
        target_P = torch.zeros(sum(p.numel() for p in policy.trainable()), device=policy.trainable()[0].device)
        for _, gradient_P in evidence.row_gradients(policy, "upper"):
            target_P += unit(gradient_P)
        target_P = unit(target_P)
        score_N = np.zeros(len(evidence.ids))
        for row, gradient_P in evidence.row_gradients(policy, "pool"):
            score_N[row] = float(unit(gradient_P) @ target_P)
        return score_N


def unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector at length 1; a vector of zeros stays."""
    return vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
