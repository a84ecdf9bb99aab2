"""A score from one pass of the policy before it is trained, to keep rows by or to weight them by.

All columns that `lit-bilevel score` writes, high or low as `scores/columns.py` says. Left out: sums of them.
"""

from __future__ import annotations

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.scores.table import fixed_weights


class PassScore(Filter):
    """A column of the scoring pass.

    Args:
        column: its name.
    """

    def __init__(self, column: str):
        self.column = column

    def scores(self, evidence: Evidence) -> np.ndarray:
        return evidence.scores().directed(self.column)

    def weights(self, evidence: Evidence) -> np.ndarray:
        """[N] weights of mean 1: a density ratio as it is, another score through a sigmoid of its z-scores."""
        return fixed_weights(self.column, self.scores(evidence))
