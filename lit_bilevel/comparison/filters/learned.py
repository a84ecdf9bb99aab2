"""The weights that an earlier run learned, as scores: the second stage of SEAL (arXiv 2410.07471).

Left out: the weights of refined responses; rows are kept with their offline ones.
"""

from __future__ import annotations

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence


class LearnedWeights(Filter):
    """The exported weights of the run that the method names."""

    def scores(self, evidence: Evidence) -> np.ndarray:
        import pyarrow.parquet

        assert evidence.earlier is not None
        table = pyarrow.parquet.read_table(evidence.earlier / "weights.parquet", columns=["id", "weight"])
        weights = dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))
        return np.array([weights[key] for key in evidence.ids])
