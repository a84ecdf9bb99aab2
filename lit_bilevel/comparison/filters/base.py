"""Filters: a score for every pool row, the highest of which are kept before a policy is trained on them.

    LowestLoss             −ℓ_i(θ₀)                     θ₀ the policy before training
    HighestLoss             ℓ_i(θ₀)
    PerplexityDifference    ℓ_i(θ₀) − ℓ_i(θ_v)          θ_v tuned on the validation rows (Moore and Lewis, 2010)
    LearnedWeights          w_i of a bilevel run        SEAL's second stage (arXiv 2410.07471)
    RandomRows, CleanRows   chance, and the truth

Validation rows that a filter sees are those of the upper part; the monitor part chooses the checkpoint of every method.
Left out: thresholds. Every filter keeps the same share, or the comparison would be one of shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.truth import read_truth


class Filter(ABC):
    """Scores the rows of a pool."""

    needs = ""
    """The method whose run of the same seed has to be there first."""

    scored = True
    """Whether the scores say something that AUROC can measure."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> np.ndarray:
        """[N] finite scores, high for rows to be kept."""

    def chosen(self, score_N: np.ndarray, keep: float, seed: int) -> np.ndarray:
        """[N] whether a row is kept: the highest share, equal scores at the cut drawn by lot."""
        if not np.isfinite(score_N).all():
            raise UserError(f"`{type(self).__name__}` gave a score that is not finite; check the policy and the data.")
        lot = np.random.default_rng(seed).random(len(score_N))
        mask = np.zeros(len(score_N), dtype=bool)
        mask[np.lexsort((lot, -score_N))[: max(1, round(keep * len(score_N)))]] = True
        return mask


class RandomRows(Filter):
    """A random share."""

    scored = False

    def scores(self, evidence: Evidence) -> np.ndarray:
        return np.random.default_rng(evidence.seed).random(len(evidence.ids))


class CleanRows(Filter):
    """All rows that the truth file calls clean, whatever share they are: the oracle."""

    scored = False

    def scores(self, evidence: Evidence) -> np.ndarray:
        if evidence.truth is None:
            raise UserError("`oracle` needs to know which rows are clean; give `--data.truth`, or leave it out.")
        return np.array([not kind for kind in read_truth(evidence.truth, evidence.ids)], dtype=float)

    def chosen(self, score_N: np.ndarray, keep: float, seed: int) -> np.ndarray:
        if not score_N.any():
            raise UserError("the truth file calls no row of the pool clean, so there is no `oracle`; leave it out.")
        return score_N > 0


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


class LearnedWeights(Filter):
    """The exported weights of the run that the method names."""

    def scores(self, evidence: Evidence) -> np.ndarray:
        import pyarrow.parquet

        assert evidence.earlier is not None
        table = pyarrow.parquet.read_table(evidence.earlier / "weights.parquet", columns=["id", "weight"])
        weights = dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))
        return np.array([weights[key] for key in evidence.ids])
