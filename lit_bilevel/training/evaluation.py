"""Losses of the monitor and test sets: per row (each row counts the same) and per token.

The monitor loss is that of the upper level's objective. The test loss is always that of the responses (of pairs, the
chosen ones); where the test rows are pairs and either level learns from pairs, their objective and the share of pairs
that are ranked right are reported too.

Rows that only fill a shape on some process count nothing, so any number of processes gives the same figure.
Left out: metrics that need generated answers; `predict` writes those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

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

    def forward(self, name: str, policy: Policy, batch: Batch) -> dict[str, Mean]:
        """Take in a batch of the set `name`; returns what to log."""
        if name == "monitor":
            loss_B = policy.losses(self.upper, batch)
            self.monitor_loss.update(loss_B, _real(batch, loss_B))
            return {"monitor/loss": self.monitor_loss}
        ranked = self.preference if batch.sign_K is not None else None
        if ranked is not None:
            batch = policy.prepared(ranked, batch)
        nll_K = policy(batch)
        loss_B = example_nll(nll_K, batch)
        real_B = _real(batch, loss_B)
        self.test_loss.update(loss_B, real_B)
        self.test_loss_per_token.update(loss_B, real_B * batch.length_B)
        found = {"test/loss": self.test_loss, "test/loss_per_token": self.test_loss_per_token}
        return found if ranked is None else found | self._ranked(ranked, nll_K, batch, real_B)

    def _ranked(self, objective: Objective, nll_K: Tensor, batch: Batch, real_B: Tensor) -> dict[str, Mean]:
        self.preference_loss.update(objective.losses(nll_K, batch), real_B)
        right_B = (objective.margins(nll_K, batch).sign() + 1) / 2  # a tie, as before any training, is half right
        self.accuracy.update(right_B, real_B)
        return {"test/preference_loss": self.preference_loss, "test/accuracy": self.accuracy}


def _real(batch: Batch, loss_B: Tensor) -> Tensor:
    """[B] 1 for rows and 0 for padding."""
    return (batch.row_B >= 0).to(loss_B.dtype)
