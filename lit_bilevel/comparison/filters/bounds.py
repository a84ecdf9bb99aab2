"""Filters that others are held against: rows drawn by chance, and the rows that the truth calls clean.

Left out: a worst case; the corrupted rows alone would be one.
"""

from __future__ import annotations

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.truth import read_truth


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

    def choose(self, score_N: np.ndarray, keep: float, seed: int) -> np.ndarray:
        if not score_N.any():
            raise UserError("the truth file calls no row of the pool clean, so there is no `oracle`; leave it out.")
        return score_N > 0
