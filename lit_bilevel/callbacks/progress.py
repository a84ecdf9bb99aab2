"""Shows the progress of a run: a bar on a terminal, plain lines everywhere else.

Both show the upper and the lower loss, the effective share of the pool, the last monitor loss, tokens a second and the
time left in the fit. Tokens are those that the policy computes, padding of its parts
included; they are counted from shapes, so nothing waits for the device. Left out: Lightning's metric names, which wrap
a bar over many lines.
"""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lit_bilevel.callbacks.run import module_of


class Rate:
    """Tokens a second and seconds left, over the steps since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.tokens = self.steps = 0

    def add(self, batch: Any) -> None:
        """Count a policy step."""
        self.steps += 1
        for level in batch.values() if isinstance(batch, dict) else ():
            self.tokens += sum(one.computed_tokens for one in level)

    def speed(self, trainer: Trainer) -> dict[str, str]:
        """Tokens a second of all processes, as text."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return {"tokens/s": compact(self.tokens * trainer.world_size / seconds)}

    def time_left(self, trainer: Trainer) -> dict[str, str]:
        """The time that the rest of the fit will take, as text; empty where its length is not known."""
        total = trainer.estimated_stepping_batches
        if not self.steps or total == float("inf"):
            return {}
        seconds = (total - trainer.global_step) * (time.monotonic() - self.started) / self.steps
        return {"left": str(datetime.timedelta(seconds=round(max(seconds, 0))))}


class Bar(TQDMProgressBar):
    """The bar on a terminal; what a narrow one cuts off is at its end."""

    TRAINING = "{desc} |{bar:10}| {n_fmt}/{total_fmt}{postfix}"

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = self.TRAINING
        return bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate = Rate()
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self.train_progress_bar.set_description_str(f"epoch {trainer.current_epoch + 1}{epochs}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rate.add(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if not trainer.training:
            return {}
        return self._rate.time_left(trainer) | short(trainer, pl_module) | self._rate.speed(trainer)


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
        metrics = short(trainer, pl_module) | self._rate.speed(trainer) | self._rate.time_left(trainer)
        shown = "  ".join(f"{name} {value}" for name, value in metrics.items())
        total = trainer.estimated_stepping_batches
        steps = f"{trainer.global_step:,}" + ("" if total == float("inf") else f"/{total:,}")
        rank_zero_info(f"epoch {trainer.current_epoch + 1}  step {steps}  {shown}")


class GenerationBar:
    """The bar of one refinement round, with that of the fit; none where the fit shows none.

    Args:
        trainer: whose bar it goes with.
        total: responses that this process generates.
    """

    FORMAT = "{desc} |{bar:10}| {n_fmt}/{total_fmt} responses, left={remaining}{postfix}"

    def __init__(self, trainer: Trainer, total: int):
        own = trainer.progress_bar_callback
        shown = trainer.is_global_zero and own is not None and not getattr(own, "is_disabled", False)
        self._rich = own.progress if shown and isinstance(own, RichProgressBar) else None
        if self._rich is not None:  # two libraries cannot share a terminal
            self._task = self._rich.add_task("generate", total=total)
        self._bar = tqdm(
            desc="generate",
            total=total,
            disable=not shown or self._rich is not None,
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
            position=1,
            miniters=0,
            bar_format=self.FORMAT,
        )
        self._tokens, self._started = 0, time.monotonic()

    def __enter__(self) -> GenerationBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._rich is not None:
            self._rich.update(self._task, visible=False)  # removed, it would shift the numbers of Lightning's tasks

    def tokens(self, count: int) -> None:
        """Count new tokens."""
        self._tokens += count
        rate = compact(self._tokens / max(time.monotonic() - self._started, 1e-9))
        self._bar.set_postfix({"tokens": compact(self._tokens), "tokens/s": rate}, refresh=False)
        self._bar.update(0)
        if self._rich is not None:
            self._rich.update(self._task, description=f"generate, {rate} tokens/s")

    def responses(self, count: int) -> None:
        """Count responses that are done."""
        self._bar.update(count)
        if self._rich is not None:
            self._rich.update(self._task, advance=count, refresh=True)


def say(text: str) -> None:
    """Log a line, above the bars where there are some."""
    with tqdm.external_write_mode():
        rank_zero_info(text)


def short(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """The metrics that count, under short names."""
    metrics = trainer.progress_bar_metrics
    names = {"upper/loss": "upper", "lower/loss": "lower"}
    module = module_of(pl_module)
    parts = {"phase": module.phase.name} if len(module.phases) > 1 else {}
    parts |= {name: f"{float(metrics[key]):.3f}" for key, name in names.items() if key in metrics}
    if "weights/effective_size" in metrics:
        share = float(metrics["weights/effective_size"]) / max(module.weights.pool_rows, 1)
        parts["effective"] = f"{share:.0%}"
    return parts | ({"monitor": f"{float(metrics['monitor/loss']):.3f}"} if "monitor/loss" in metrics else {})


def compact(number: float) -> str:
    """A number in four places or so: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"
