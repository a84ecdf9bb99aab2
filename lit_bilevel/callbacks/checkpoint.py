"""Saves checkpoints: `best.ckpt` by the monitor loss, `last.ckpt` to continue from.

Lightning's own class skips time-based saving under manual optimization and warns at every save; this one decides when
to save by itself and leaves the saving to Lightning. `last.ckpt` is saved after every validation and epoch, and after
steps where that is asked for, but only where a resumed run repeats every bit: where validation or the end of an epoch
follows a step, after those, or a resumed run would leave them out.

SIGTERM and Ctrl-C are answered at the next such place, so a validation or a round is brought to its end first; a
second one ends the process at once, and the last checkpoint stays as it is; so does one while testing, where nothing is
at stake. With several processes a signal to any of them is a signal to all. When a new run starts in the folder of an
earlier one, its checkpoints are renamed to `earlier-*`. Left out: keeping more than one best checkpoint.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_bilevel.callbacks.choice import LatestWithin, look_once, losses_by_row
from lit_bilevel.callbacks.nodes import check_shared
from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_folder
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.training.checkpoint_io import install
from lit_bilevel.training.folder import check_room, try_folder
from lit_bilevel.training.trainer import find_callbacks, policy_of


class Stopped(SystemExit):
    """The run was stopped by a signal after a checkpoint was saved; ends a program with the usual exit status."""


class BilevelCheckpoint(ModelCheckpoint):
    """Keeps the monitor-best state and the last one.

    Args:
        every_n_steps: also save `last.ckpt` every so many policy steps.
        every_minutes: also save `last.ckpt` when so many minutes have passed since it was last saved.
        dirpath: folder of the checkpoints; by default `checkpoints/` in the run folder.
        tolerance: `best.ckpt` is the latest state whose monitor loss is higher than the lowest one by no more than so
            many standard errors of the difference (`choice.py`); at 0 the lowest.
    """

    of_run = True
    """That this is the callback that a run's results are taken from."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
        dirpath: str | None = None,
        tolerance: float = 0.0,
    ):
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("every_minutes", every_minutes, 0),
            ("tolerance", tolerance, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"`checkpoint.{name}` is {value}; it must be at least {least}.")
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
        self._own_dirpath = self.dirpath
        self._choice = LatestWithin(tolerance)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._saved_at = time.monotonic()
        self._due = False
        self._signal = self._agreed = 0
        self._began = False

    # ---- the run ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()
        self._set_folder(trainer)
        self._refuse_clashes(trainer)
        if stage == "fit" and not is_rehearsal(trainer):
            if trainer.is_global_zero:
                try_folder(run_folder(trainer))
                try_folder(str(self.dirpath), "checkpoint.dirpath")
            check_shared(trainer, Path(str(self.dirpath)))
        super().setup(trainer, pl_module, stage)
        install(trainer.strategy)

    def _refuse_clashes(self, trainer: Trainer) -> None:
        """Refuse other callbacks that would write over our files, or be taken for `last.ckpt`.

        Raises:
            UserError: saying which setting of theirs.
        """
        for other in find_callbacks(trainer, ModelCheckpoint):
            if other is self:
                continue
            if other.save_last:
                raise UserError(
                    f"`{type(other).__name__}` has `save_last`, and `--ckpt_path last` would continue from whichever"
                    " last checkpoint is newer; leave it out (`checkpoint.every_n_steps` saves `last.ckpt` more often)."
                )
            if other.filename in ("best", "last") and other.dirpath in (None, self.dirpath):
                raise UserError(
                    f"`{type(other).__name__}` saves to {self.dirpath}/{other.filename}.ckpt, which is the run's own;"
                    " give it another `filename` or `dirpath`."
                )

    def _set_folder(self, trainer: Trainer) -> None:
        # Lightning's choice would be the first logger's folder; an earlier Trainer's may be another
        self.dirpath = self._own_dirpath or os.path.join(run_folder(trainer), "checkpoints")

    def _forget(self) -> None:
        """Put away what an earlier fit found, or its best state would be that of this one."""
        self.best_model_path = self.kth_best_model_path = self.last_model_path = ""
        self.best_model_score, self.current_score = None, None
        self.best_k_models = {}
        self.kth_value, self._last_global_step_saved = torch.tensor(torch.inf), 0
        self._choice.lowest_M = None

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        self._set_folder(trainer)  # `--ckpt_path last` is looked up before `setup`
        return super()._find_last_checkpoints(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal = self._agreed = 0
        self._began = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _listen(self._note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = True
        self._saved_at, self._due = time.monotonic(), False
        _listen(self._note)
        # not before, for a strategy that shards the policy loads the checkpoint only after `on_fit_start`
        if trainer.ckpt_path is None and trainer.is_global_zero and not is_rehearsal(trainer):
            self._set_aside()
            check_room(str(self.dirpath), _bytes_of(module_of(pl_module)))
        look_once(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where a run that was to be continued had come to its end before."""
        if not self._began and trainer.ckpt_path is not None:
            rank_zero_warn(
                f"the run in {trainer.ckpt_path} is finished ({trainer.global_step:,} policy steps), so no step was"
                " made; raise `trainer.max_epochs` or `trainer.max_steps` to go on."
            )

    def _set_aside(self) -> None:
        for name in ("last.ckpt", "best.ckpt"):
            path = Path(str(self.dirpath)) / name
            if path.exists():
                aside = path.with_name(f"earlier-{name}")
                if aside.is_dir():  # with a part from every process
                    shutil.rmtree(aside)
                os.replace(path, aside)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        _listen(_end)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            _end(number, frame)
        self._signal = number
        rank_zero_info(f"{signal.Signals(number).name}: saving a checkpoint after this step (again: stop at once) …")

    # ---- when ----

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_rehearsal(trainer):
            return
        due = trainer.global_step == trainer.max_steps
        due |= bool(self.every_n_steps) and trainer.global_step % (self.every_n_steps or 1) == 0
        if self.every_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
            due = trainer.strategy.broadcast(due or late)  # clocks differ; rank 0 decides
        self._agree(trainer)
        self._due |= due or self._must_end(pl_module)
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return
        self._save_and_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        training = trainer.state.fn == "fit" and not trainer.sanity_checking and not is_rehearsal(trainer)
        if training and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._due |= self._last_global_step_saved != trainer.global_step  # a new best brought its `last.ckpt`
            self._agree(trainer)
            self._save_and_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        self._agree(trainer)
        self._due |= trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # else cut short by `max_steps`
        self._save_and_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module_of(pl_module).evaluation.monitor_rows = [] if self._choice.tolerance > 0 else None

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        rows = module_of(trainer.lightning_module).evaluation.monitor_rows
        if current is None or not rows:
            return super().check_monitor_top_k(trainer, current)
        return self._choice.takes(losses_by_row(trainer, rows))

    # ---- what ----

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lowest": self._choice.lowest_M}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know the best state again where the run folder was moved, or is named in another way; else the next one would
        take its place, however bad.
        """

        state_dict = dict(state_dict)

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        if state_dict["best_model_path"] and Path(here(state_dict["best_model_path"])).exists():
            names = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = state_dict | {name: here(state_dict[name]) for name in names}
            state_dict["best_k_models"] = {here(path): score for path, score in state_dict["best_k_models"].items()}
            state_dict["dirpath"] = self.dirpath
        self._choice.lowest_M = state_dict.pop("lowest", None)
        super().load_state_dict(state_dict)

    def _agree(self, trainer: Trainer) -> None:
        """A signal to any process is a signal to all; one that comes after this waits for the next time."""
        self._agreed = self._signal
        if trainer.world_size > 1:
            own = torch.tensor(float(self._agreed), device=trainer.strategy.root_device)
            self._agreed = int(trainer.strategy.reduce(own, reduce_op="max"))  # type: ignore[arg-type]

    def _must_end(self, pl_module: LightningModule) -> bool:
        return bool(self._agreed) or module_of(pl_module).guard.reason is not None

    def _save_and_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        must_end = self._must_end(pl_module)
        if self._due or must_end:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved_at, self._due = time.monotonic(), False
        if must_end:
            module_of(pl_module).guard.stop_if_asked()
            rank_zero_info(f"stopped after {trainer.global_step} policy steps; continue with `--ckpt_path last`")
            raise Stopped(0 if _was_launched(trainer) else 128 + self._agreed)


def _bytes_of(module: LitBilevel) -> int:
    """About what the best and the last checkpoint, the next one beside them and the exported policy take."""
    policy = policy_of(module)
    trained = sum(parameter.numel() * parameter.element_size() for parameter in policy.trainable())
    return 3 * trained + trained  # optimizer states, up to twice as much, come with the first step


def _listen(handler: Callable[[int, FrameType | None], None]) -> None:
    """Answer SIGTERM and Ctrl-C in this way; the Trainer puts the old handlers back at the end."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def _was_launched(trainer: Trainer) -> bool:
    """Whether Lightning started this process; if so it kills the one that did unless this one ends with 0."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.local_rank > 0 and isinstance(environment, LightningEnvironment)


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped(128 + number)
