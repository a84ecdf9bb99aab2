"""Measures losses of the monitor and test sets: per row (each row counts the same) and per token.

The monitor loss is that of the upper level, with its standard error beside it, for the monitor part is small. The test
loss is always that of the responses (of pairs, the chosen ones); where the test rows are pairs and either level learns
from pairs, their objective and the share of pairs that are ranked right are reported too.

Rows that only fill a shape on some process count nothing, so any number of processes gives the same figure.
Left out: metrics that need generated answers; `predict` writes those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lit_bilevel.losses import example_nll
from lit_bilevel.objectives.base import Objective
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Batch


class Mean(MeanMetric):
    """A running mean whose sums stay in float32 or better, also in a module of lower precision.

    In bfloat16 a sum of losses stops growing at a few hundred rows.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def precise(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved.to(torch.promote_types(moved.dtype, torch.float32)) if moved.is_floating_point() else moved

        return super()._apply(precise, exclude_state)


class StandardError(Metric):
    """How far a mean over rows may be from that over all rows like them: s / √n; NaN for fewer than two rows.

    The sums are in float64, or losses that hardly differ would have no digits left.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss_B: Tensor, real_B: Tensor) -> None:
        """Take in [B] losses and [B] 1 for rows, 0 for padding."""
        loss_B, real_B = loss_B.double(), real_B.double()
        self.total += (loss_B * real_B).sum()
        self.squares += (loss_B.square() * real_B).sum()
        self.count += real_B.sum()

    def compute(self) -> Tensor:
        """The error of the mean, in the unit of the losses."""
        mean = self.total / self.count
        # rounding can bring a variance of nearly 0 below it
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        return (variance / (self.count - 1)).sqrt()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def precise(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device) if tensor.dtype == torch.float64 else fn(tensor)

        return super()._apply(precise, exclude_state)


class Evaluation(nn.Module):
    """Running means over an evaluation loop, by the name that they are logged under.

    Args:
        lower: objective of the lower level.
        upper: objective of the upper level.
    """

    def __init__(self, lower: Objective, upper: Objective):
        super().__init__()
        self.upper = upper
        self.preference = next((one for one in (upper, lower) if one.pairs), None)
        # the mean over all rows or none: by default those without a finite loss would be left out
        self.monitor_loss, self.test_loss, self.test_loss_per_token = (Mean(math.nan) for _ in range(3))
        self.preference_loss, self.accuracy = Mean(math.nan), Mean(math.nan)
        self.monitor_error = StandardError()
        self.monitor_rows: list[Tensor] | None = None
        """[B, 2] row and loss of each batch of this process in the last look at the monitor part, if they are kept."""

    def forward(self, name: str, policy: Policy, batch: Batch) -> dict[str, Metric]:
        """Take in a batch of the set `name`; returns what to log."""
        if name == "monitor":
            # by the upper objective, for it is what the policy and the weights are trained for
            loss_B = policy.losses(self.upper, batch)
            real_B = _real(batch, loss_B)
            self.monitor_loss.update(loss_B, real_B)
            self.monitor_error.update(loss_B, real_B)
            if self.monitor_rows is not None:
                self.monitor_rows.append(torch.stack([batch.row_B, loss_B], dim=1).double())
            return {"monitor/loss": self.monitor_loss, "monitor/error": self.monitor_error}
        ranked = self.preference if batch.sign_K is not None else None
        if ranked is not None:
            batch = policy.prepare(ranked, batch)
        nll_K = policy(batch)
        loss_B = example_nll(nll_K, batch)
        real_B = _real(batch, loss_B)
        self.test_loss.update(loss_B, real_B)
        self.test_loss_per_token.update(loss_B, real_B * batch.length_B)
        metrics: dict[str, Metric] = {"test/loss": self.test_loss, "test/loss_per_token": self.test_loss_per_token}
        return metrics if ranked is None else metrics | self._rank(ranked, nll_K, batch, real_B)

    def _rank(self, objective: Objective, nll_K: Tensor, batch: Batch, real_B: Tensor) -> dict[str, Metric]:
        self.preference_loss.update(objective.losses(nll_K, batch), real_B)
        right_B = (objective.margins(nll_K, batch).sign() + 1) / 2  # a tie, as before any training, is half right
        self.accuracy.update(right_B, real_B)
        return {"test/preference_loss": self.preference_loss, "test/accuracy": self.accuracy}


def _real(batch: Batch, loss_B: Tensor) -> Tensor:
    """[B] 1 for rows and 0 for padding."""
    return (batch.row_B >= 0).to(loss_B.dtype)
