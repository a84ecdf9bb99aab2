"""The weights made visible: a histogram and tables of the top and bottom rows, after every epoch.

Left out: anything in the training step; the cheap scalars of a step are logged by the module.
"""

from __future__ import annotations

import html
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_bilevel.module import LitBilevel

MARKUP = "\\`*_{}[]()+-!|~"


class WeightInspector(Callback):
    """Shows the distribution of the weights and the rows at both ends.

    Args:
        rows: rows in each of the two tables.
        characters: longest text shown in a cell.
    """

    def __init__(self, rows: int = 20, characters: int = 300):
        self.rows = rows
        self.characters = characters

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitBilevel)
        table = pl_module.weights.table().cpu()
        visits = pl_module.weights.visits.cpu()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram("weights/distribution", table, step)
                order = table.argsort()
                data = trainer.datamodule.sets["pool"]  # type: ignore[attr-defined]
                ends = {"weights/lowest": order[: self.rows], "weights/highest": order.flip(0)[: self.rows]}
                for name, rows in ends.items():
                    logger.experiment.add_text(name, self._markdown(data, rows, table, visits), step)

    def _markdown(self, data: Any, rows: Tensor, table: Tensor, visits: Tensor) -> str:
        lines = ["| weight | visits | id | prompt | response |", "|---|---|---|---|---|"]
        for row in rows.tolist():
            record = data[row]
            texts = [table_cell(record[name], self.characters) for name in ("id", "prompt", "response")]
            lines.append(f"| {table[row]:.3g} | {visits[row]} | {' | '.join(texts)} |")
        return "\n".join(lines)


def table_cell(text: str, characters: int = 300) -> str:
    """Text that is safe in a Markdown table: nothing in it is markup."""
    cut = text if len(text) <= characters else text[:characters] + " …"
    escaped = "".join(f"&#{ord(c)};" if c in MARKUP else c for c in html.escape(cut))
    return "<br>".join(escaped.splitlines())
