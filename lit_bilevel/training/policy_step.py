"""Takes the policy's own step: clips its gradient, steps its optimizer and its schedule.

    ‖gradient‖ ≤ `gradient_clip_val`, then θ ← optimizer, rate ← schedule        nothing where ‖gradient‖ is not finite

Under loss scaling, the scale is lowered where it made gradients overflow. DeepSpeed keeps gradients to itself, clips
them and skips steps on its own, so it is asked whether it did. Left out: the weights' step, which `Refinement` takes
and takes back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_bilevel.problem import norm as total_norm
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.training.trainer import policy_of
from lit_bilevel.types import Features

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.amp import GradScaler
    from torch.optim.lr_scheduler import LambdaLR

    from lit_bilevel.module import LitBilevel


def step_policy(
    module: LitBilevel,
    optimizer: LightningOptimizer,
    features: Features,
    effective_size: Tensor | None,
    tally: ResponseTally | None,
) -> bool:
    """Clip the policy's gradient and take its step and that of its schedule, unless the gradient is not finite.

    Args:
        module: the `LitBilevel`, whose guard is told of everything.
        optimizer: the policy's, as Lightning wraps it.
        features: rows of the global window, with their losses.
        effective_size: of the weights, where they know it.
        tally: of the generated responses of all processes, if there were any.

    Returns:
        Whether the step was taken, on every process alike.
    """
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    norm = clip_gradient(module, scaler)
    vitals = module.guard.read(norm, effective_size, tally)
    module.guard.watch_ratios(module, vitals)  # of a step that is skipped, too: they may be why
    if not math.isfinite(vitals.gradient_norm):
        module.guard.count_skipped(module, features, lower_loss_scale(scaler))
        return False
    optimizer.step()
    engine = _deepspeed_engine(module)
    if engine is not None and not engine.was_step_applied():  # it looks at gradients by itself
        module.guard.count_skipped(module, features, getattr(engine.optimizer, "loss_scale", 1) > 1)
        return False
    cast("LambdaLR", module.lr_schedulers()).step()
    module.guard.watch_weights(module, vitals.effective_size)
    module.guard.count_taken()
    return True


def clip_gradient(module: LitBilevel, scaler: GradScaler | None) -> Tensor:
    """Clip the policy's gradient to `gradient_clip_val`, if that is set; returns the norm that it had before."""
    if _deepspeed_engine(module) is not None:
        # it keeps the gradients to itself, clips them and skips steps that overflowed
        return torch.zeros((), device=module.device)
    scale = 1.0 if scaler is None else scaler.get_scale()  # Lightning unscales in the step, and may do so once only
    parameters = policy_of(module).trainable()
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if module.gradient_clip_val is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, module.gradient_clip_val * scale, norm)
    return norm / scale


def lower_loss_scale(scaler: GradScaler | None) -> bool:
    """Lower the loss scale after an overflow; returns whether it was above 1, so that the overflow was its own."""
    if scaler is None or scaler.get_scale() <= 1:
        return False
    lower = scaler.get_scale() * scaler.get_backoff_factor()
    scaler.load_state_dict({**scaler.state_dict(), "scale": lower, "_growth_tracker": 0})
    return True


def _deepspeed_engine(module: LitBilevel) -> Any:
    """DeepSpeed's engine, where that is the strategy."""
    strategy = module.trainer.strategy
    return strategy.model if isinstance(strategy, DeepSpeedStrategy) else None
