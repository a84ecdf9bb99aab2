"""What a run says while it goes: a bar on a terminal, plain lines everywhere else.

Both show the upper and the lower loss, the effective number of rows and its share of the pool, the best monitor loss so
far, tokens a second and the time left in the fit. Tokens are those that the policy computes, padding of its parts
included; they are counted from shapes, so nothing waits for the device. Left out: Lightning's metric names, which wrap
a bar over many lines.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_bilevel.module import LitBilevel


class Rate:
    """Tokens a second and seconds left, over the steps since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.tokens = self.steps = 0

    def add(self, batch: Any) -> None:
        """Count a policy step."""
        self.steps += 1
        for level in batch.values() if isinstance(batch, dict) else ():
            self.tokens += sum((part.stop - part.start) * part.width for one in level for part in one.parts)

    def shown(self, trainer: Trainer) -> dict[str, str]:
        """Both as text."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        found = {"tokens/s": compact(self.tokens * trainer.world_size / seconds)}
        total = trainer.estimated_stepping_batches
        if self.steps and total != float("inf"):
            left = (total - trainer.global_step) * seconds / self.steps
            found["left"] = str(datetime.timedelta(seconds=round(max(left, 0))))
        return found


class Bar(TQDMProgressBar):
    """The bar on a terminal."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate = Rate()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rate.add(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if not trainer.training:
            return {}
        return short(trainer, pl_module) | self._rate.shown(trainer)


class Lines(ProgressBar):
    """Plain lines, for logs and pipes.

    Args:
        every_seconds: time between two lines.
    """

    def __init__(self, every_seconds: float = 20.0):
        super().__init__()
        self.every_seconds = every_seconds
        self.is_disabled = True  # no bar of its own, and none of generation

    def disable(self) -> None:
        """Nothing to do: there is no bar."""

    def enable(self) -> None:
        """Nothing to do: there is no bar."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate = Rate()
        self._said = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rate.add(batch)
        if time.monotonic() - self._said >= self.every_seconds:
            self._say(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._said = time.monotonic()
        metrics = short(trainer, pl_module) | self._rate.shown(trainer)
        shown = "  ".join(f"{name} {value}" for name, value in metrics.items())
        total = trainer.estimated_stepping_batches
        steps = f"{trainer.global_step:,}" + ("" if total == float("inf") else f"/{total:,}")
        rank_zero_info(f"epoch {trainer.current_epoch + 1}  step {steps}  {shown}")


def short(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """The metrics that count, under short names."""
    metrics = trainer.progress_bar_metrics
    names = {"upper/loss": "upper", "lower/loss": "lower", "monitor/loss": "monitor"}
    found = {name: f"{float(metrics[key]):.3f}" for key, name in names.items() if key in metrics}
    if "weights/effective_size" in metrics:
        assert isinstance(pl_module, LitBilevel)
        size = float(metrics["weights/effective_size"])
        found["effective"] = f"{compact(size)} ({size / max(pl_module.weights.pool_rows, 1):.0%})"
    return found


def compact(number: float) -> str:
    """A number in four places or so: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"
