"""Files of weights as a run leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet


def write_weights(path: Path, ids: list[str], weights: np.ndarray, sources: list[str]) -> str:
    columns = {"id": ids, "row": np.arange(len(ids)), "source": sources, "weight": weights}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)
