"""Tells whether the monitor part of the validation file is large enough to choose between methods.

The loss of each monitor row under two policies is a pair, so what counts is the standard error of the mean difference.
Example: on 32 rows B is 0.020 above A with an error of 0.025; a set of 32 other rows may well put B first. To tell them
apart (a difference of twice its error) it would take 32 · (2 · 0.025 / 0.020)² = 200 rows.

Each policy is at the checkpoint that the same rows chose, which flatters the best a little more than this says.
Left out: corrections for many methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_bilevel.comparison.results import Losses
from lit_bilevel.comparison.significance import standard_error

CLEAR = 2.0
"""A difference of so many standard errors counts as told apart."""


class Rival(NamedTuple):
    """A method beside the one with the best monitor loss."""

    method: str
    difference: float
    """Of the monitor losses, mean over rows; not below 0."""
    error: float
    """Standard error of the difference; NaN for a single row."""
    rows: int

    @property
    def is_clear(self) -> bool:
        """Whether the monitor part tells the two apart."""
        return self.difference > CLEAR * self.error

    @property
    def rows_needed(self) -> float:
        """Monitor rows on which such a difference would be clear."""
        return self.rows * (CLEAR * self.error / self.difference) ** 2 if self.difference > 0 else math.inf


def rivals(losses: Losses, methods: Sequence[str] | None = None) -> tuple[str, list[Rival]] | None:
    """The method with the best monitor loss, and the others from the nearest on.

    Args:
        losses: of the monitor rows, by method and seed; averaged over the seeds that all methods have.
        methods: those to choose from; by default all.

    Returns:
        Name and rivals; `None` where there are not two methods with a seed in common.
    """
    names = [name for name in methods or losses if name in losses]
    seeds = sorted(set.intersection(*(set(losses[name]) for name in names))) if len(names) > 1 else []
    if not seeds:
        return None
    loss_n = {name: np.mean([losses[name][seed] for seed in seeds], axis=0) for name in names}
    best = min(names, key=lambda name: loss_n[name].mean())
    others = []
    for name in names:
        if name != best:
            difference_n = loss_n[name] - loss_n[best]
            others.append(Rival(name, float(difference_n.mean()), standard_error(difference_n), len(difference_n)))
    return best, sorted(others, key=lambda rival: rival.difference)


def in_words(losses: Losses, methods: Sequence[str] | None = None) -> str:
    """What the monitor part can tell about a choice, and what to do where that is little; empty for no choice."""
    rivalry = rivals(losses, methods)
    if rivalry is None:
        return ""
    best, others = rivalry
    rows = others[0].rows
    close = [rival for rival in others if not rival.is_clear]
    if not close:
        return (
            f"The monitor part ({rows:,} rows) tells {best} from the others: the nearest, {others[0].method}, is"
            f" {others[0].difference:.4f} ± {others[0].error:.4f} above it (standard error of the paired difference)."
        )
    listed = ", ".join(f"{rival.method} (+{rival.difference:.4f} ± {rival.error:.4f})" for rival in close)
    needed = close[-1].rows_needed
    enough = (
        f"about {math.ceil(needed):,} rows would tell {close[-1].method} apart"
        if needed < 1e6
        else ("more rows may not tell them apart either")
    )
    return (
        f"By the monitor loss {best} is the best, but {rows:,} rows cannot tell it from {listed} (standard errors of"
        f" the paired differences): {enough}. Prefer the cheaper of these, or raise `data.monitor_fraction`, or add"
        " validation rows."
    )
