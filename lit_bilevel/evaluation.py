"""Losses of the monitor and test sets: per row (each row counts the same) and per token.

Rows that only fill a shape on some process count nothing, so any number of processes gives the same figure.
Left out: metrics that need generated answers; `predict` writes those.
"""

from __future__ import annotations

import math

from torch import nn
from torchmetrics import MeanMetric

from lit_bilevel.losses import example_nll
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Batch


class Evaluation(nn.Module):
    """Running means over an evaluation loop, by the name that they are logged under."""

    def __init__(self) -> None:
        super().__init__()
        # the mean over all rows or none: by default those without a finite loss would be left out
        self.monitor_loss, self.test_loss, self.test_loss_per_token = (MeanMetric(math.nan) for _ in range(3))

    def forward(self, name: str, policy: Policy, batch: Batch) -> dict[str, MeanMetric]:
        """Take in a batch of the set `name`; returns what to log."""
        loss_B = example_nll(policy(batch), batch)
        real_B = (batch.row_B >= 0).to(loss_B.dtype)
        if name == "monitor":
            self.monitor_loss.update(loss_B, real_B)
            return {"monitor/loss": self.monitor_loss}
        self.test_loss.update(loss_B, real_B)
        self.test_loss_per_token.update(loss_B, real_B * batch.length_B)
        return {"test/loss": self.test_loss, "test/loss_per_token": self.test_loss_per_token}
