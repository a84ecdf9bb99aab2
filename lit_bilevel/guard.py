"""Numerical faults in training: a policy step whose gradient is not finite is skipped, counted and named.

The decision costs one flag from the device a step, the one that clipping needs anyway; rows are looked for only when
it is down. After `limit` such steps in a row the run is stopped: `BilevelCheckpoint` saves first, and as no step was
taken since, what it saves is the last good policy. Left out: repairing anything; a run that meets bad numbers again and
again needs other settings or other data.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.errors import UserError
from lit_bilevel.problem import norm as total_norm
from lit_bilevel.types import Features

NAMED = 8


class Guard:
    """Counts skipped steps, and holds the reason why a run must end, if there is one.

    Args:
        limit: skipped steps in a row after which the run stops.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.reason: str | None = None
        """Why the run must end; whoever saves checkpoints does so first."""

    def admits(self, module: Any, optimizer: Any, features: Features) -> bool:
        """Clip the policy's gradient; whether the step may be taken, on every process alike.

        Args:
            module: the `LitBilevel`.
            optimizer: the policy's.
            features: rows of the global window, with their losses.
        """
        if isinstance(module.trainer.strategy, DeepSpeedStrategy):
            return True  # it keeps the gradients to itself, clips them and skips steps that overflowed
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if _clipped(module.policy.trainable(), module.gradient_clip_val):
            self.in_a_row = 0
            return True
        self.skipped += 1
        module.log("skipped_steps", float(self.skipped))
        if scaler is not None and scaler.get_scale() > 1:
            scaler.update()  # an overflow of the scale, not of the numbers: it is lowered, and no fault is counted
            return False
        self.in_a_row += 1
        where = f"policy step {module.trainer.fit_loop.epoch_loop.total_batch_idx + 1}"
        rank_zero_warn(f"{where} was skipped, because its gradient is not finite: {_culprits(module, features)}.")
        if self.in_a_row >= self.limit:
            self.reason = (
                f"{self.in_a_row} policy steps in a row had a gradient that is not finite (the last is {where}), so the"
                " run was stopped; lower the learning rate, set `model.gradient_clip_val`, or look at the rows named in"
                " the warnings above, then continue from the last checkpoint (`model.max_skipped_steps` is"
                f" {self.limit})."
            )
        return False

    def stop_if_asked(self) -> None:
        """End the run if there is a reason to.

        Raises:
            UserError: with that reason.
        """
        if self.reason is not None:
            raise UserError(self.reason)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]


def _clipped(parameters: list[Any], limit: float | None) -> bool:
    """Clip the gradient to a norm; False if that is not finite."""
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return bool(torch.isfinite(norm))


def _culprits(module: Any, features: Features) -> str:
    """The rows whose loss is not finite, by id."""
    if features.loss_B is None:
        return "losses are not known"
    rows = features.row_B[~torch.isfinite(features.loss_B)].tolist()
    if not rows:
        return "every row of the pool has a finite loss, so it is the validation rows or the backward pass"
    frozen = module.refinement.rows.tolist()
    pool_rows = module.weights.pool_rows
    ids = module.trainer.datamodule.sets["pool"].select_columns(["id"])
    names = []
    for row in rows[:NAMED]:
        own = row if row < pool_rows else frozen[row - pool_rows]
        names.append(f"{ids[own]['id']!r}" + (" (a generated response)" if row >= pool_rows else ""))
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"the loss is not finite on rows {', '.join(names)}{more}"
