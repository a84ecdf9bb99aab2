"""A score from one pass of the policy before it is trained, to keep rows by or to weight them by.

All columns that `lit-bilevel score` writes, high or low as `scores/columns.py` says. Left out: sums but `combined`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.scores.table import weights_from_score


class PassScore(Filter):
    """A column of the scoring pass.

    Args:
        column: its name.
    """

    def __init__(self, column: str):
        self.column = column

    def scores(self, evidence: Evidence) -> np.ndarray:
        return evidence.scores().orient(self.column)

    def write_weights(self, evidence: Evidence, folder: Path) -> np.ndarray:
        """Write `weights.parquet` for `WarmStart`; returns the weights [N], of mean 1.

        A density ratio is a weight as it is; others go through a sigmoid (`weights_from_score`).
        """
        import pyarrow
        import pyarrow.parquet

        weight_N = weights_from_score(self.column, self.scores(evidence))
        folder.mkdir(exist_ok=True)
        table = pyarrow.table({"id": evidence.ids, "weight": weight_N})
        pyarrow.parquet.write_table(table, folder / "weights.parquet")
        return weight_N
