"""Deals pool rows out to folds, for solvers that keep a model which did not learn a row.

    fold_of(row, 2)         0 or 1, by a hash of the row's number

By a hash, for a file may go through good and bad rows in turn. Left out: folds of equal size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_bilevel.types import PADDING_ROW, Example

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def fold_of(row: int, folds: int) -> int:
    """Which fold a row is in; the same in every run."""
    # not a checksum or a product: those repeat from row to row
    return hashlib.blake2b(row.to_bytes(8, "little"), digest_size=8).digest()[0] % folds


def folds_of(trainer: Trainer | None, level: str) -> int:
    """Into how many folds the rows of a level are dealt out in this step; the solver of the Trainer's module says."""
    module: Any = None if trainer is None else trainer.lightning_module
    if level != "lower" or not hasattr(module, "solver") or not module.phase.runs_solver:
        return 1
    return module.solver.folds


def split_folds(examples: Sequence[Example], folds: int) -> list[list[Example]]:
    """Some examples, at least one, by their folds; a fold without an example has padding.

    So every process makes the same number of batches.
    """
    if folds == 1:
        return [list(examples)]
    parts: list[list[Example]] = [[] for _ in range(folds)]
    for example in examples:
        # padding goes where there is room: it counts nothing anywhere
        fold = min(range(folds), key=lambda k: len(parts[k])) if example.row < 0 else fold_of(example.row, folds)
        parts[fold].append(example)
    shortest = min(examples, key=lambda example: len(example.input_ids))
    return [part or [replace(shortest, row=PADDING_ROW)] for part in parts]
