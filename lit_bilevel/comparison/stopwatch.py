"""Measures how long a fit took, also where it was killed and continued.

Lightning's `Timer` does the same and cannot be put into a `config.yaml`. Left out: the time after the last checkpoint
of a killed run; that work was lost.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stopwatch(Callback):
    """Counts the seconds of training, monitor looks included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._earlier = self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter() - self._earlier

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]  # no more than that: a test of the best checkpoint loads its state too
