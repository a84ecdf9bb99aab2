"""Flags of a run that is killed and continued."""

from __future__ import annotations

from pathlib import Path

from support.refining import REFINE


def run_flags(small: dict[str, str], folder: Path, more: tuple[str, ...]) -> list[str]:
    """Flags of a run with refinement: epochs of 12 steps, validation after every fourth, a checkpoint at every step."""
    return [
        *REFINE,
        *(f"--data.{name}={path}" for name, path in small.items()),
        "--data.batch_size=8",
        "--trainer.val_check_interval=4",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_n_steps=1",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]
