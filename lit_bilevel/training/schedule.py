"""Schedules λ and the policy's learning rate, both by the number of the policy step.

    λ = that of the phase, if it sets one, else max(0, λ₀ − decay · k)
        k epochs that are over, or policy steps taken by `upper_weight_decay_every`
    learning rate = rate · factor · schedule(step − first step, length)
        of the last phase that set a factor, over it and the phases after it that set none

Counted in steps, runs on fewer rows, which take more epochs for as many steps, have the same λ in every step.
Left out: a λ that rises within a phase.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_bilevel.errors import UserError
from lit_bilevel.training.phases import borders

if TYPE_CHECKING:
    from lit_bilevel.module import LitBilevel


def upper_weight_of(module: LitBilevel) -> float:
    """λ in this step of a `LitBilevel`."""
    if module.phase.upper_weight is not None:
        return module.phase.upper_weight
    every = module.upper_weight_decay_every
    falls = module.current_epoch if every is None else module.global_step // every
    return max(0.0, module.upper_weight - module.upper_weight_decay * falls)


def most_falls(module: LitBilevel) -> float:
    """How often λ will have fallen in the last step of a fit; infinite where the fit's end is not known."""
    epochs, steps, every = module.trainer.max_epochs, module.trainer.max_steps, module.upper_weight_decay_every
    if every is None:
        return epochs - 1 if epochs is not None and epochs > 0 else math.inf
    return (steps - 1) // every if steps > 0 else math.inf


def learning_rate_factor(module: LitBilevel, steps: float) -> Callable[[int], float]:
    """What the policy's learning rate is multiplied with, as a function of the step.

    Args:
        module: the `LitBilevel`.
        steps: of the run; infinite where it has no end.

    Raises:
        UserError: for a schedule that is no function of the step.
    """
    starts, factors, begin = [0.0], [1.0], 0.0
    for phase, end in zip(module.phases, borders(module.phases, steps), strict=True):
        if phase.learning_rate is not None:
            starts.append(begin)
            factors.append(phase.learning_rate)
        begin = end
    ends = [*starts[1:], steps]
    schedules = [_schedule(module, end - start) for start, end in zip(starts, ends, strict=True)]

    def factor(step: int) -> float:
        index = bisect.bisect_right(starts, step) - 1
        return factors[index] * schedules[index](step - int(starts[index]))

    return factor


def _schedule(module: LitBilevel, steps: float) -> Callable[[int], float]:
    """The schedule of transformers over so many steps, as a function of the step."""
    from transformers import get_scheduler

    length = None if math.isinf(steps) else max(1, int(steps))
    # transformers makes a schedule for an optimizer; here only its function of the step is wanted
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    settings, name = module.lr_scheduler_kwargs, module.lr_scheduler
    if name == "constant" and module.warmup_steps:
        name = "constant_with_warmup"  # transformers' `constant` would leave them out without a word
    made = get_scheduler(name, unused, module.warmup_steps, length, scheduler_specific_kwargs=settings)
    if not isinstance(made, LambdaLR):
        raise UserError(f"`model.lr_scheduler` is {name}, which is no function of the step; use another.")
    return made.lr_lambdas[0]
