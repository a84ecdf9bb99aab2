"""Begins the weights at those of an earlier run's `weights.parquet`.

Rows are joined by `id`, so the pool may have changed in between; rows that are new weigh 1. Left out: continuing an
interrupted run, which `--ckpt_path last` does exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_bilevel.callbacks.run import module_of
from lit_bilevel.errors import UserError
from lit_bilevel.training.trainer import data_of


class WarmStart(Callback):
    """Gives every row the weight that it ended with in an earlier run.

    Args:
        weights: the `weights.parquet` of that run.
    """

    def __init__(self, weights: str):
        self.path = weights
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._resumed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:
            return
        earlier = _read(self.path)
        ids = data_of(trainer).sets["pool"]["id"][:]
        known = sum(key in earlier for key in ids)
        if known == 0:
            raise UserError(f"{self.path} has no id of the pool; give the weights of a run on the same rows.")
        rank_zero_info(
            f"{known:,} of {len(ids):,} rows start with their weight in {self.path}, by id; the others with 1"
        )
        weight_N = torch.tensor([earlier.get(key, 1.0) for key in ids], dtype=torch.float64)
        module_of(pl_module).weights.set_prior(weight_N)


def _read(path: str) -> dict[str, float]:
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the `weights.parquet` of an earlier run.")
    try:
        table = pyarrow.parquet.read_table(path, columns=["id", "weight"])
    except (pyarrow.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} is not a table with `id` and `weight` ({error}).") from error
    return dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))
