"""The socket for filters: a score for every pool row, the highest of which are kept before a policy is trained on them.

    class Shortest(Filter):
        def scores(self, evidence):
            return -np.array([len(text) for text in evidence.texts("pool")], dtype=float)

`lit-bilevel compare --methods my_package.Shortest` runs it. Validation rows that a filter sees are those of the upper
part; the monitor part chooses the checkpoint of every method. Left out: thresholds. Every filter keeps the same share,
or the comparison would be one of shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.errors import UserError


class Filter(ABC):
    """Scores the rows of a pool."""

    needs = ""
    """The method whose run of the same seed has to be there first."""

    scored = True
    """Whether the scores say something that AUROC can measure."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> np.ndarray:
        """[N] finite scores, high for rows to be kept."""

    def choose(self, score_N: np.ndarray, keep: float, seed: int) -> np.ndarray:
        """[N] whether a row is kept: the highest share, equal scores at the cut drawn by lot."""
        if not np.isfinite(score_N).all():
            raise UserError(f"`{type(self).__name__}` gave a score that is not finite; check the policy and the data.")
        lot = np.random.default_rng(seed).random(len(score_N))
        mask = np.zeros(len(score_N), dtype=bool)
        mask[np.lexsort((lot, -score_N))[: max(1, round(keep * len(score_N)))]] = True
        return mask
