"""Begins a fit: builds the weights for its pool, and forgets what an earlier run of the same objects left in them.

Where a module is fitted again to the same pool, policy, weights and solver go on as they are, as Lightning's modules
do; counts of faults and refined rows begin anew, and so do the data's order and the callbacks. A module that learned on
another pool is refused, for its weights belong to rows.

Left out: a Trainer that goes on by itself; `ckpt_path` continues a run exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_bilevel.data.fingerprint import rows_digest
from lit_bilevel.errors import UserError, gather
from lit_bilevel.policy.randomness import part_random_states

if TYPE_CHECKING:
    from lit_bilevel.data.module import BilevelDataModule
    from lit_bilevel.module import LitBilevel


def begin(module: LitBilevel, stage: str) -> None:
    """Give a `LitBilevel` the weights of the pool at hand, and forget an earlier fit.

    Args:
        module: with its Trainer.
        stage: Lightning's; only `fit` forgets anything.

    Raises:
        UserError: without a `BilevelDataModule`, and for parts that learned on another pool or in another module.
    """
    module.guard.reason = None
    weights, fits = module.weights, stage == "fit"
    if weights.pool_rows and not fits:
        return  # a trained policy may be tested on any data
    data: BilevelDataModule | None = getattr(module.trainer, "datamodule", None)
    if data is None or getattr(data, "pool_sources", None) is None:
        raise UserError("`LitBilevel` needs a `BilevelDataModule`, to know how many rows to weight; pass one.")
    # by content and not by number: a table of weights is only worth something for its own rows in their order
    pool = data.sets["pool"]
    digest = rows_digest(pool)
    if fits:
        _refuse_used(module, digest, len(pool))
        module.guard.begin()
        module.refinement.begin()
        module.own_optimizer = None
    if weights.pool_rows == 0 or module.pool_digest not in (None, digest):  # the latter never trained
        weights.build(data.pool_sources, torch.float64 if module.trainer.precision == "64-true" else torch.float32)
    module.pool_digest = digest


def begin_fit(module: LitBilevel) -> None:
    """What waits until the strategy has set the module up, and comes before a checkpoint is read."""
    part_random_states(module.global_rank)  # after the policy is made; a resumed run takes its own up later
    # under a precision below float32 DeepSpeed casts every parameter, and in bfloat16 small steps of weights are lost
    for parameter, value in module.uncast:
        parameter.data = value.to(parameter.device)
    module.uncast = []
    _tell_of_slow_types(module)


def _tell_of_slow_types(module: LitBilevel) -> None:
    """Say where a precision that saves time elsewhere costs time here: seen 20-fold on a CPU with AVX2 alone."""
    precision = str(module.trainer.precision)
    if module.device.type != "cpu" or not precision.startswith("bf16"):
        return
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        rank_zero_info(
            f"`trainer.precision` is {precision}, for which this CPU has no instructions: a step can take many times as"
            " long as in 32-true"
        )


def _refuse_used(module: LitBilevel, digest: str, rows: int) -> None:
    """Refuse what an earlier fit left a state in that is not of this module and this pool."""
    trainer, problems = module.trainer, []
    if trainer.global_step > 0 and trainer.ckpt_path is None:
        problems.append(
            f"this Trainer has made {trainer.global_step:,} steps already and would count on; make a new `Trainer`, or"
            " continue a run with `ckpt_path`"
        )
    weights = module.weights
    learned = bool(weights.visits.any())
    if module.pool_digest not in (None, digest) and (learned or module.solver.state_dict()):
        problems.append(
            f"this `LitBilevel` was fitted to another pool ({weights.pool_rows:,} rows; this one has {rows:,}), and its"
            " weights belong to those rows; make a new one, with new weights and a new solver (`WarmStart` takes over"
            " weights by id)"
        )
    if module.pool_digest is None:
        if learned:
            problems.append(f"the `{type(weights).__name__}` learned in another `LitBilevel`; make new ones")
        elif weights.pool_rows not in (0, rows):
            problems.append(f"the weights were built for {weights.pool_rows:,} rows and the pool has {rows:,}")
        for part in (module.solver, module.refinement.rule):
            if any(_is_left(value) for value in part.state_dict().values()):
                problems.append(f"the `{type(part).__name__}` holds what another run left; make a new one")
    if problems:
        raise gather("a fit cannot begin with these objects", problems)


def _is_left(value: Any) -> bool:
    """Whether a value of a state says that something was taken in: sums and counts begin at 0."""
    return not (value is None or (isinstance(value, int | float) and value == 0))
