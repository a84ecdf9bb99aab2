"""Writes checkpoint files that are either the old one or the new one, whenever the process is killed.

Lightning writes to a temporary file too, but in the system's temporary folder, and then moves it: across file systems
that is a copy, which a kill leaves half done. Here `replacing` writes beside the target. What is loaded may hold
tensors, numbers and strings only: a checkpoint cannot run code.
Left out: remote storage, which Lightning's own class handles.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lit_bilevel.errors import UserError
from lit_bilevel.files import replacing

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames; `BilevelCheckpoint` installs it where Lightning's default would be."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(str(path).removeprefix("file://"))
        with replacing(target) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Read a checkpoint, with `weights_only=True` whatever is asked for.

        Raises:
            UserError: if there is none, or it is damaged, or it holds anything else.
        """
        try:
            return super().load_checkpoint(path, *arguments, **settings | {"weights_only": True})
        except FileNotFoundError as error:
            others = sorted(other.name for other in Path(path).parent.glob("*.ckpt"))
            there = f" (in that folder: {', '.join(others)})" if others else ""
            raise UserError(f"the checkpoint {path} does not exist; check `--ckpt_path`{there}.") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise UserError(
                f"{path} is no checkpoint that can be read: it is damaged, or it holds more than tensors, numbers and"
                f" strings, which is refused because it could run code ({type(error).__name__}); give one from a run's"
                " `checkpoints/` folder."
            ) from error


def install(strategy: Strategy) -> None:
    """Let a strategy write its checkpoints this way, unless it was given a way of its own."""
    if strategy._checkpoint_io is None or type(strategy._checkpoint_io) is TorchCheckpointIO:
        strategy._checkpoint_io = AtomicCheckpointIO()
