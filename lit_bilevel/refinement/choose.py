"""Chooses which rows are refined: one small class a rule, and a socket for others.

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


def _check(fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise UserError(f"`fraction` is {fraction}; it must be in (0, 1].")
    return fraction


class LowestFraction(RowChooser):
    """The lowest-weighted share of the rows, chosen anew in each round; equal weights at the cut are drawn by lot.

    Args:
        fraction: share of the rows that have a question.
    """

    def __init__(self, fraction: float = 0.1):
        self.fraction = _check(fraction)

    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        # by lot, or a pool whose weights are still equal would be refined from its beginning on
        lot = torch.randperm(len(weight_N), generator=torch.Generator().manual_seed(seed))
        return lot[weight_N[lot].argsort(stable=True)[: _count(self.fraction, len(weight_N))]]


class RandomFraction(RowChooser):
    """A random share of the rows, the same in every round.

    Args:
        fraction: share of the rows that have a question.
    """

    def __init__(self, fraction: float = 0.1):
        self.fraction = _check(fraction)

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


class BelowTypical(RowChooser):
    """All rows that weigh less than a fraction of what a good row typically weighs: few in a pool with few bad rows.

        threshold = factor · quantile of the weights

    While weights differ little no row is chosen. Of equal weights at the cut all or none are.

    Args:
        factor: of the typical weight; rows below it are refined.
        quantile: the weight that stands for a good row; a larger share of the rows than one minus it must be good.
        most: largest share of the rows that is refined, the lowest-weighted ones.
    """

    def __init__(self, factor: float = 0.3, quantile: float = 0.75, most: float = 0.5):
        for name, value in (("factor", factor), ("quantile", quantile)):
            if not 0 < value < 1:
                raise UserError(f"`{name}` is {value}; it must lie between 0 and 1.")
        if not 0 < most <= 1:
            raise UserError(f"`most` is {most}; it must be in (0, 1].")
        self.factor, self.quantile, self.most = factor, quantile, most

    def rows(self, weight_N: Tensor, seed: int) -> Tensor:
        ordered, order = weight_N.sort(stable=True)
        typical = ordered[round(self.quantile * (len(ordered) - 1))]
        below = int((ordered < self.factor * typical).sum())
        return order[: min(below, int(self.most * len(ordered)))]
