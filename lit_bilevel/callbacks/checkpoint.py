"""Checkpoints: `best.ckpt` by the monitor loss, `last.ckpt` to continue from.

Lightning's own class skips time-based saving under manual optimization and warns at every save; this one decides when
to save by itself and leaves the saving to Lightning. Left out: keeping more than one best checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_bilevel.callbacks.export import is_rehearsal


class BilevelCheckpoint(ModelCheckpoint):
    """Keeps the monitor-best state and the last one.

    Args:
        every_n_steps: also save `last.ckpt` every so many policy steps.
        every_minutes: also save `last.ckpt` when so many minutes have passed since it was last saved.
        dirpath: folder of the checkpoints; by default `checkpoints/` in the run folder.
    """

    def __init__(
        self, every_n_steps: int | None = None, every_minutes: float | None = None, dirpath: str | None = None
    ):
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor="monitor/loss",
            mode="min",
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        due = trainer.global_step == trainer.max_steps
        due |= bool(self.every_n_steps) and trainer.global_step % (self.every_n_steps or 1) == 0
        if self.every_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
            due = trainer.strategy.broadcast(due or late)  # clocks differ; rank 0 decides
        if due:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # not cut short by `max_steps`
        if complete and not is_rehearsal(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._saved_at = time.monotonic()
