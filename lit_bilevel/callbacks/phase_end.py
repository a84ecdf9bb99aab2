"""Calls once at the end of a phase, in every run that is killed and continued, too.

    class Rescore(AtPhaseEnd):
        def close(self, trainer, module, index): ...

A checkpoint is saved only after the call, or before the last step of the phase, so a killed run has it once in the end.
`SecondLook` has a border of its own within a phase. Left out: the beginning of a phase.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.callbacks.run import is_rehearsal, module_of
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.training.phases import borders, index_of


class AtPhaseEnd(Callback):
    """Something to be done when a phase in which the solver runs is over.

    Args:
        phase: its name; by default the last one that learns weights or prepares the solver.
    """

    sets_weights = True
    """Read by `training/callbacks.py`, which does not know this class."""
    needs_solver = True
    """Whether its phase has to run the solver."""

    def __init__(self, phase: str | None = None):
        self.phase = phase
        self._done = False
        self._known = False  # whether a checkpoint said so

    @property
    def is_done(self) -> bool:
        """Whether it has closed its phase."""
        return self._done

    @abstractmethod
    def close(self, trainer: Trainer, module: LitBilevel, index: int) -> None:
        """Do it, on all processes alike; `index` is the number of the phase."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(phase=self.phase)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._known = state_dict["done"], True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._done, self._known = False, False
        module = module_of(pl_module)
        if self.needs_solver and not module.phases[self.phase_index(module)].runs_solver:
            raise UserError(
                f"`{type(self).__name__}` names the phase {self.phase!r}, in which the solver does not run; name"
                " another."
            )
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            raise UserError(
                f"`{type(self).__name__}` waits for the end of a phase, and the run has none; set `trainer.max_steps`"
                " or `trainer.max_epochs`."
            )
        self.check(trainer, module)

    def check(self, trainer: Trainer, module: LitBilevel) -> None:
        """Refuse a run in which it cannot work, before anything is computed.

        Raises:
            UserError: saying why.
        """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that is continued behind the border, from a checkpoint without this callback, has nothing to close."""
        border = self._border(trainer, module_of(pl_module))
        if trainer.ckpt_path is not None and not self._known and trainer.global_step >= border:
            self._done = True
            rank_zero_warn(
                f"`{type(self).__name__}` does nothing: the checkpoint is of a run without it, and its phase was over"
                f" after {border:.0f} steps; continue from an earlier checkpoint."
            )

    def phase_index(self, module: LitBilevel) -> int:
        """Number of the phase.

        Raises:
            UserError: if there is none of the name, or none in which the solver runs.
        """
        if self.phase is not None:
            return index_of(module.phases, self.phase)
        running = [index for index, phase in enumerate(module.phases) if phase.runs_solver]
        if not running:
            raise UserError(
                f"the solver runs in no phase of `model.phases`, so `{type(self).__name__}` has no end to wait for."
            )
        return running[-1]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = module_of(pl_module)
        if not self._done and trainer.global_step >= self._border(trainer, module):
            self._close(trainer, module, self.phase_index(module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where steps were skipped: at the end of the last epoch."""
        module = module_of(pl_module)
        index = self.phase_index(module)
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if not self._done and last and index == len(module.phases) - 1:
            self._close(trainer, module, index)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._done and not is_rehearsal(trainer):
            name = module_of(pl_module).phases[self.phase_index(module_of(pl_module))].name
            rank_zero_warn(
                f"the run ended before its phase {name!r} was over, so `{type(self).__name__}` set no weights; continue"
                " it (`--ckpt_path last`), or find out what stopped it: `EarlyStopping` on `monitor/loss` ends a phase"
                " in which the policy rests."
            )

    def _border(self, trainer: Trainer, module: LitBilevel) -> float:
        """The number of policy steps after which the phase is over."""
        return borders(module.phases, trainer.estimated_stepping_batches)[self.phase_index(module)]

    def _close(self, trainer: Trainer, module: LitBilevel, index: int) -> None:
        self.close(trainer, module, index)
        self._done = True
