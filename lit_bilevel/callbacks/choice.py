"""Chooses the latest state of a policy whose monitor loss is no worse than the lowest one by more than chance.

    mean d ≤ tolerance · s/√M        d_m = ℓ_m − ℓ_m^low: loss of monitor row m now, less that at the lowest check so
                                     far; s their standard deviation over the M rows

A few dozen rows are a poor judge: one answer that a policy is sure of and wrong about can outweigh all others. For
example, 31 rows that fell from 0.86 to 0.70 and one that rose from 5 to 13 have a mean that rose by 0.1, with an error
of 0.25. Later states have learned more, so of those that the rows cannot tell apart the last one is taken. Differences
of rows are much more exact than the difference of two means, so that a policy which gets worse on most rows is told.
Source: the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984).

Left out: averages of the states that cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_bilevel.callbacks.run import is_rehearsal


class LatestWithin:
    """Compares every check with the lowest one so far.

    Args:
        tolerance: in standard errors of the paired difference; at 0 only a lower loss is better.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.lowest_M: Tensor | None = None

    def takes(self, loss_M: Tensor) -> bool:
        """Whether a state is to be chosen, given its losses of the monitor rows, [M] float64 in a fixed order."""
        if self.lowest_M is None or len(self.lowest_M) != len(loss_M):
            taken = lower = True
        else:
            difference_M = loss_M - self.lowest_M
            error = difference_M.std() / len(loss_M) ** 0.5 if len(loss_M) > 1 else torch.zeros(())
            lower = bool(difference_M.mean() < 0)
            taken = lower or bool(difference_M.mean() <= self.tolerance * error)
        if lower and bool(loss_M.isfinite().all()):
            self.lowest_M = loss_M
        return taken


def losses_by_row(trainer: Trainer, rows: Sequence[Tensor]) -> Tensor:
    """[M] losses of a look at the monitor part, by row, on all processes alike; of `Evaluation.monitor_rows`."""
    table = torch.cat(list(rows))
    if trainer.world_size > 1:
        gathered = trainer.strategy.all_gather(table)
        table = gathered.flatten(0, 1)
    table = table[table[:, 0] >= 0]
    return table[table[:, 0].argsort(), 1].cpu()


def look_once(trainer: Trainer) -> None:
    """Let a run that would end before its first look at the monitor part look after its last step."""
    total, every = trainer.estimated_stepping_batches, trainer.val_check_interval
    counted = trainer.check_val_every_n_epoch is None and isinstance(every, int) and trainer.limit_val_batches != 0
    if counted and total < every and not is_rehearsal(trainer):
        steps = trainer.val_check_batch = int(total)
        rank_zero_warn(
            f"`trainer.val_check_interval` is {every} and the run has {steps:,} steps, so the monitor loss is"
            f" looked at once, after the last of them; set it to {max(1, steps // 8)}, for example, to choose among"
            " several checkpoints."
        )
