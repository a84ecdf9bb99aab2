"""Chooses how sequences are laid out for the policy's calls, by the Trainer's strategy and the policy.

Left out: measuring what a call costs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_bilevel.policy.policy import Policy


class Layout(NamedTuple):
    """What `collate` is told of the machine.

    Args:
        call_cost: how many tokens' computation one more call of the policy is worth saving.
        pack_width: tokens that a packed row has at least; `None` for padded rows.
    """

    call_cost: float = math.inf
    pack_width: float | None = None


def layout_for(trainer: Trainer | None, packing: bool) -> Layout:
    """The layout under this Trainer; without one, a single call of padded or packed rows.

    A sharded policy needs as many calls on every process: one a batch, which packed ones have anyway.
    """
    if trainer is None:
        return Layout(math.inf, 0.0 if packing else None)
    if packing:
        policy = cast("Policy", trainer.lightning_module.policy)
        return Layout(math.inf, math.inf if policy.takes_any_length else 0.0)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return Layout()
    return Layout(256 if trainer.strategy.root_device.type == "cpu" else 4096)
