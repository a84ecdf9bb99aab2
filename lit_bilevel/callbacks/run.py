"""Answers what callbacks ask about a run: its module, folder, checkpoint and loggers, and whether it leaves files.

Left out: settings of the run; see `inspection/settings.py`.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.training.trainer import find_callbacks


def module_of(pl_module: LightningModule) -> LitBilevel:
    """The module that Lightning hands to a callback, under its type.

    Raises:
        UserError: if it is another kind of module.
    """
    if not isinstance(pl_module, LitBilevel):
        raise UserError(
            f"callbacks of lit_bilevel need a `LitBilevel`, and the Trainer has a `{type(pl_module).__name__}`; take"
            " them out of `trainer.callbacks`, or train a `LitBilevel`."
        )
    return pl_module


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run: `trainer.default_root_dir`."""
    return Path(trainer.default_root_dir)


def is_rehearsal(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def run_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the monitor-best state, wherever it stands among others; `None` where there is none.

    Not `trainer.checkpoint_callback`, the first of any kind: it may save every few steps and call its last file best.
    """
    callbacks = find_callbacks(trainer, ModelCheckpoint)
    own = [c for c in callbacks if getattr(c, "of_run", False)]
    return next((c for c in (*own, *callbacks) if c.monitor == "monitor/loss"), None)


def boards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that show more than scalars."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
