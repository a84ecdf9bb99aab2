"""What a policy step exchanges with other processes: gradients through the strategy, scores by gathering.

Scores of all processes are brought together, so that each of them takes the same weight step.
O(global batch) numbers are exchanged, never O(N). Rows are ordered by their number, so the result does not depend on
how they were dealt out; rows that only filled a shape are dropped. Left out: gathering gradients.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor

from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.problem import Values
from lit_bilevel.training.trainer import policy_of
from lit_bilevel.types import PADDING_ROW, Features

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from lit_bilevel.module import LitBilevel


def lightning_engine(module: LitBilevel) -> Engine:
    """The machinery around a step, from a `LitBilevel`'s strategy and precision."""
    trainer, strategy = module.trainer, module.trainer.strategy
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    sharded = isinstance(strategy, ModelParallelStrategy)
    one_backward = isinstance(strategy, DeepSpeedStrategy)
    # DeepSpeed has no gradients to hold back from stage 2 on, and its one backward pass a step is the synchronised one
    unsynchronised = nullcontext if one_backward else getattr(strategy, "block_backward_sync", nullcontext)
    return Engine(
        backward=module.manual_backward,
        unsynchronised=unsynchronised,
        average=(lambda values: values) if sharded else functools.partial(averaged, strategy=strategy),
        world_size=trainer.world_size,
        loss_scale=1.0 if scaler is None else scaler.get_scale(),
        differences=_keeps_digits(trainer.precision) and policy_of(module).precise,
        sharded=sharded,
        one_backward=one_backward,
    )


def _keeps_digits(precision: str) -> bool:
    """Whether losses have the digits of their type: products of float32 matrices may be rounded to TF32 or bfloat16."""
    return precision == "64-true" or (precision == "32-true" and torch.get_float32_matmul_precision() == "highest")


def averaged(values: Values, strategy: Strategy) -> Values:
    """The mean of each tensor over processes."""
    return [strategy.reduce(value, reduce_op="mean") for value in values]


def gathered_scores(
    problem: PolicyProblem, s_B: Tensor | None, strategy: Strategy, refined: bool
) -> tuple[Features, Tensor, dict[str, Tensor]]:
    """Features with losses, scores, and the losses to log, over the global window.

    Args:
        problem: the policy step, with its lower losses computed.
        s_B: this process's scores, or `None` where nothing is learned (they count as 0).
        strategy: Lightning's strategy, for `all_gather` and `reduce`.
        refined: whether any row is refined; a window may then hold such a row twice, as its pair and as its group.
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
    table = torch.stack([column.double() for column in columns], dim=1)
    upper, rows = problem.upper_loss, problem.lower[0].window_rows
    if problem.engine.world_size > 1:
        if refined:  # processes can hold different numbers of examples; gathering takes equal ones
            most = 2 * -(-rows // problem.engine.world_size)
            table = torch.nn.functional.pad(table, (0, 0, 0, most - len(table)), value=PADDING_ROW)
        table = strategy.all_gather(table).flatten(0, 1)
        upper = None if upper is None else strategy.reduce(upper, reduce_op="mean")
    if refined:
        table = table[table[:, 0] >= 0]
    ordered = table[:, 0].argsort(descending=True)  # padding comes last
    row, source, length, loss, weight, s = table[ordered if refined else ordered[:rows]].unbind(1)
    # the weights are those before the weight step
    losses = {"lower/loss": loss.mean(), "lower/weighted_loss": (weight * loss).sum() / rows}
    if upper is not None:
        losses["upper/loss"] = upper
    return Features(row.long(), source.long(), length.long(), loss), s, losses


def gathered_responses(found: Tensor | None, trainer: Trainer) -> Tensor | None:
    """What was found of the generated responses of a step, over all processes.

    Args:
        found: what `weigh_responses` returned here, or `None` where no row is refined.
        trainer: Lightning's.

    Returns:
        The same over all processes, if there were any responses.
    """
    if found is None:
        return None
    if trainer.world_size > 1:
        table = trainer.strategy.all_gather(found)
        found = torch.cat([table[table[:, 0].argmax(), :2], table[:, 2:].sum(0)])
    return found if found[3] > 0 else None
