"""Makes the problem of one policy step from a `LitBilevel`, and the machinery that its passes run in.

Left out: what is exchanged besides gradients; see `exchange`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.problem import Values
from lit_bilevel.training.trainer import policy_of
from lit_bilevel.types import Batch

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from lit_bilevel.module import LitBilevel


def make_problem(module: LitBilevel, batch: dict[str, list[Batch]], optimizer: Optimizer) -> PolicyProblem:
    """The two levels of one policy step.

    Args:
        module: the `LitBilevel`.
        batch: micro-batches of the levels `lower` and `upper`.
        optimizer: the policy's own, unwrapped.
    """
    return PolicyProblem(
        policy_of(module),
        batch["lower"],
        batch["upper"],
        weigh=functools.partial(module.refinement.weigh, module.weights),
        needs_loss=module.weights.needs_loss or module.refinement.needs_loss,
        upper_weight=module.current_upper_weight,
        optimizer=optimizer,
        engine=lightning_engine(module),
        objectives=(module.lower_objective, module.upper_objective),
    )


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
        # FSDP2 averages in its backward passes, through which all gradients go there
        average=(lambda values: values) if sharded else functools.partial(average, strategy=strategy),
        world_size=trainer.world_size,
        loss_scale=1.0 if scaler is None else scaler.get_scale(),
        differences=_keeps_digits(trainer.precision) and policy_of(module).precise,
        sharded=sharded,
        one_backward=one_backward,
    )


def _keeps_digits(precision: str) -> bool:
    """Whether losses have the digits of their type: products of float32 matrices may be rounded to TF32 or bfloat16."""
    return precision == "64-true" or (precision == "32-true" and torch.get_float32_matmul_precision() == "highest")


def average(values: Values, strategy: Strategy) -> Values:
    """The mean of each tensor over processes."""
    return [strategy.reduce(value, reduce_op="mean") for value in values]
