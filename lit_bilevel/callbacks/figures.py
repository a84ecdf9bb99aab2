"""Draws the figures of a finished fit: PNG files in `figures/` of the run folder, and the same in TensorBoard.

`inspection/figures.py` says which. Left out: figures while a run goes; TensorBoard has curves for that.
"""

from __future__ import annotations

import importlib.util

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_bilevel.callbacks.run import boards, is_rehearsal, run_folder
from lit_bilevel.inspection.figures import draw
from lit_bilevel.training.trainer import data_of


class Figures(Callback):
    """Draws the figures of a run at its end.

    Args:
        enabled: whether to draw them.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or is_rehearsal(trainer):
            return
        if importlib.util.find_spec("matplotlib") is None:
            rank_zero_info("no figures, since matplotlib is missing (install the extra `figures`)")
            return
        for logger in trainer.loggers:
            logger.save()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        truth = data_of(trainer).truth
        for name, figure in draw(run_folder(trainer), truth).items():
            for board in boards(trainer):
                board.experiment.add_figure(f"figures/{name}", figure, step)
