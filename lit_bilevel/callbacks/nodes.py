"""Checks that all nodes see one run folder: the first process writes checkpoints, and every process reads them.

A run on several nodes whose folders are different ones would train to its end and then find no checkpoint to test, and
could not be continued. So it is looked at before the first step. Left out: folders that are lost later on.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lit_bilevel.errors import UserError


def check_shared(trainer: Trainer, folder: Path) -> None:
    """See whether what the first process writes into a folder is there for all; called on every process.

    Raises:
        UserError: on every process, if a node has a folder of its own.
    """
    if trainer.num_nodes == 1:
        return
    # a new name every time: a network file system may remember that a file was not there
    token = folder / f".seen-by-all-{trainer.strategy.broadcast(uuid.uuid4().hex)}"
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    trainer.strategy.barrier()
    seen = torch.tensor(float(token.exists()), device=trainer.strategy.root_device)
    everywhere = bool(trainer.strategy.reduce(seen, reduce_op="min"))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        token.unlink()
    if not everywhere:
        raise UserError(
            f"{folder} is not the same folder on all {trainer.num_nodes} nodes, and every process reads the checkpoints"
            " that the first one writes; give `trainer.default_root_dir` a folder on a file system that the nodes"
            " share, by the same name."
        )
