"""The machinery around a policy step, as functions: `training/engine.py` has those of a strategy, tests plain ones.

Left out: the optimizers' steps, which the module takes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from lit_bilevel.problem import Values


@dataclass(frozen=True)
class Engine:
    """What a policy step needs of the machinery around it.

    Args:
        backward: runs the backward pass of a scalar loss (with loss scaling and averaging, if any).
        unsynchronised: context in which `backward` leaves gradients local, because another pass follows.
        average: replaces each tensor by its mean over processes.
        world_size: number of processes over which gradients are averaged.
        loss_scale: factor that `backward` puts on gradients (1 without loss scaling).
        differences: whether losses keep float32's digits or better.
        sharded: whether parameters are spread over processes; `backward` then averages on its way.
        one_backward: whether a step may call `backward` once only.
    """

    backward: Callable[[Tensor], None]
    unsynchronised: Callable[[], AbstractContextManager]
    average: Callable[[Values], Values]
    world_size: int = 1
    loss_scale: float = 1.0
    differences: bool = True
    sharded: bool = False
    one_backward: bool = False
