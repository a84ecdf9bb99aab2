"""Which rows are refined: one small class a rule, and a socket for others.

All of them see the weights of all rows that have a question, on every process the same. Left out: rules that read the
policy's losses; the weights already sum up what the losses said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lit_bilevel.errors import UserError


class RowChooser(ABC):
    """Chooses rows of the pool for refinement, among those that have a question."""

    @abstractmethod
    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        """Positions in `weight_N`.

        Args:
            weight_N: [N] weights of the rows that have a question, in the order of the pool; those of refined rows as
                they were frozen. These are all rows, unless some are plain text.
            seed: that of the data order.
        """


def _count(fraction: float, rows: int) -> int:
    return max(1, round(fraction * rows))


def _checked(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise UserError(f"`fraction` is {fraction}; it must be in (0, 1].")
    return fraction


class LowestFraction(RowChooser):
    """The lowest-weighted share of the rows, chosen anew at each refresh; equal weights at the cut are drawn by lot.

    Args:
        fraction: share of the rows that have a question.
    """

    def __init__(self, fraction: float = 0.1):
        self.fraction = _checked(fraction)

    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        lot = torch.randperm(len(weight_N), generator=torch.Generator().manual_seed(seed))
        return lot[weight_N[lot].argsort(stable=True)[: _count(self.fraction, len(weight_N))]]


class RandomFraction(RowChooser):
    """A random share of the rows, the same at every refresh.

    Args:
        fraction: share of the rows that have a question.
    """

    def __init__(self, fraction: float = 0.1):
        self.fraction = _checked(fraction)

    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(weight_N), generator=generator)[: _count(self.fraction, len(weight_N))]


class BelowThreshold(RowChooser):
    """All rows that weigh less than a threshold; the mean weight is 1.

    Args:
        threshold: largest weight that is refined, not included.
    """

    def __init__(self, threshold: float = 0.1):
        if not threshold > 0:
            raise UserError(f"`threshold` is {threshold}; it must be above 0, or no row is ever chosen.")
        self.threshold = threshold

    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        return (weight_N < self.threshold).nonzero()[:, 0]
