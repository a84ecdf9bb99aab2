"""Weight optimizers that are safe when a row is visited once an epoch.

Adam on a table moves every row at every step, so the learned order is mostly the order of the last visit (measured:
AUROC 0.84 on two groups of constant loss, where visited-rows-only updates give 1.00). Everything here leaves rows
without a gradient alone.

Left out: momentum on the table; it would move rows that were not visited.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer


class ExponentiatedGradient(Optimizer):
    """ω ← ω − lr · gradient on the rows that have one: mirror descent for weights that are exp(ω) up to a constant.

    With gradients (s − b)/c of unit scale, `lr` is the typical change of a row's log weight at a visit.

    Args:
        params: the parameters of the weights; sparse gradients touch their rows only.
        lr: step size in log weight per visit.
    """

    def __init__(self, params, lr: float = 0.3):
        if lr < 0:
            raise ValueError(f"`lr` is {lr}; it must be at least 0.")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    parameter.index_add_(0, gradient._indices()[0], gradient._values(), alpha=-group["lr"])
                else:
                    parameter.add_(gradient, alpha=-group["lr"])
        return loss
