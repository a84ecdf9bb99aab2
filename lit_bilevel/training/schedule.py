"""The schedule of λ: 0 until a share of the run is done, then a staircase down to 0.

    λ = max(0, λ₀ − decay · k)      k epochs that are over, or policy steps taken by `upper_weight_decay_every`

Counted in steps, runs on fewer rows, which take more epochs for as many steps, have the same λ in every step.
Left out: a λ that rises again.
"""

from __future__ import annotations

import math
from typing import Any


def upper_weight_of(module: Any) -> float:
    """λ in this step of a `LitBilevel`."""
    if module.progress < module.upper_weight_start:
        return 0.0
    every = module.upper_weight_decay_every
    falls = module.current_epoch if every is None else module.global_step // every
    return max(0.0, module.initial_upper_weight - module.upper_weight_decay * falls)


def most_falls(module: Any) -> float:
    """How often λ will have fallen in the last step of a fit; infinite where the fit's end is not known."""
    epochs, steps, every = module.trainer.max_epochs, module.trainer.max_steps, module.upper_weight_decay_every
    if every is None:
        return epochs - 1 if epochs > 0 else math.inf
    return (steps - 1) // every if steps > 0 else math.inf
