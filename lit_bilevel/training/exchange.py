"""Gathers from all processes what a policy step needs: the scores of its rows, and the tally of its responses.

Scores of all processes are brought together, so that each of them takes the same weight step.
O(global batch) numbers are exchanged, never O(N). Rows are ordered by their number, so the result does not depend on
how they were dealt out; rows that only filled a shape are dropped. Left out: gradients, which the strategy averages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.types import PADDING_ROW, Features

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy


def gather_scores(
    problem: PolicyProblem, s_B: Tensor | None, strategy: Strategy, uneven: bool
) -> tuple[Features, Tensor, dict[str, Tensor]]:
    """Features with losses, scores, and the losses to log, over the global window.

    Args:
        problem: the policy step, with its lower losses computed.
        s_B: this process's scores, or `None` where nothing is learned (they count as 0).
        strategy: Lightning's strategy, for `all_gather` and `reduce`.
        uneven: whether processes can hold different numbers of examples: where rows are dealt out to folds, or any is
            refined and a window may hold it twice, as its pair and as its group.
    """
    own = [batch.features for batch in problem.lower]
    loss_B = problem.lower_losses()
    columns = [
        torch.cat([features.row_B for features in own]),
        torch.cat([features.source_B for features in own]),
        torch.cat([features.length_B for features in own]),
        loss_B,
        problem.weights(),
        torch.zeros_like(loss_B) if s_B is None else s_B,
    ]
    # one table and one exchange; float64, for float32 counts rows up to 2^24 only
    table = torch.stack([column.double() for column in columns], dim=1)
    upper, rows = problem.upper_loss, problem.lower[0].window_rows
    if problem.engine.world_size > 1:
        if uneven:  # gathering takes equal ones
            most = 2 * -(-rows // problem.engine.world_size) + len(own)  # and one that fills each empty fold
            table = torch.nn.functional.pad(table, (0, 0, 0, most - len(table)), value=PADDING_ROW)
        table = strategy.all_gather(table).flatten(0, 1)
        # each process's part of f is a sum over its own rows times the number of processes
        upper = None if upper is None else strategy.reduce(upper, reduce_op="mean")
    if uneven:
        table = table[table[:, 0] >= 0]
    # by row and not by process, for float sums depend on their order; padding comes last
    ordered = table[:, 0].argsort(descending=True)
    row, source, length, loss, weight, s = table[ordered if uneven else ordered[:rows]].unbind(1)
    # the weights are those before the weight step
    losses = {"lower/loss": loss.mean(), "lower/weighted_loss": (weight * loss).sum() / rows}
    if upper is not None:
        losses["upper/loss"] = upper
    return Features(row.long(), source.long(), length.long(), loss), s, losses


def gather_tally(tally: ResponseTally | None, trainer: Trainer) -> ResponseTally | None:
    """The tally of the generated responses of all processes.

    Args:
        tally: what `weigh_responses` returned here, or `None` where no row is refined.
        trainer: Lightning's.

    Returns:
        That of all processes, if there were any responses.
    """
    if tally is None:
        return None
    if trainer.world_size > 1:
        tally = ResponseTally.over(trainer.strategy.all_gather(tally.pack()))
    return tally if tally.tokens > 0 else None
