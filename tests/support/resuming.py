"""Short fits, and signals that stop them."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Callback

from lit_bilevel.cli import BilevelCLI


class Signal(Callback):
    """Sends this process a signal in a hook, when so many policy steps are done."""

    def __init__(self, hook: str, step: int, number: int):
        def send(trainer, *rest, **named):
            if trainer.global_step == step and not trainer.sanity_checking and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, hook, send)


def fit(flags: list[str], *more: str, callbacks: tuple[Callback, ...] = ()) -> BilevelCLI:
    return BilevelCLI(["fit", *flags, *more], trainer_defaults={"callbacks": list(callbacks)})


def short(small, folder: Path) -> list[str]:
    """One epoch of 12 steps with validation after the 4th, 8th and 12th, and dropout, which needs the random states."""
    return [
        "--config=configs/quickstart.yaml",
        "--model.policy.lora={r: 4, dropout: 0.2}",
        *(f"--data.{name}={path}" for name, path in small.items()),
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=4",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={folder}",
    ]
