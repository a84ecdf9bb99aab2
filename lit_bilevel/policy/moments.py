"""Scales a direction as the next step of the policy's own optimizer would scale it.

    P·d = d / (√v̂ + eps)        v̂ = (β·v + (1−β)·d²) / (1 − β^{t+1}), Adam's second moments after a step along d

The *next* moments: with the present ones an entry whose gradient was 0 so far is divided by eps alone, and outweighs
all others. Left out: optimizers without such moments, which are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.errors import UserError
from lit_bilevel.problem import Values


def precondition(optimizer: Optimizer, parameters: Sequence[Tensor], direction: Values) -> Values:
    """P·direction.

    Args:
        optimizer: of the policy, before or between its steps.
        parameters: those that the direction has parts for, in this order.
        direction: in the shape of the parameters.

    Raises:
        UserError: if the optimizer keeps no second moments as Adam does.
    """
    known = dict(zip(parameters, direction, strict=True))
    for group in optimizer.param_groups:
        states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
        if "betas" not in group or "eps" not in group or any(s and "exp_avg_sq" not in s for s in states):
            raise UserError(
                f"`{type(optimizer).__name__}` keeps no second moments as Adam does, so the direction cannot"
                " be preconditioned; use AdamW as `model.optimizer`, or set `preconditioned: false`."
            )
        decay = group["betas"][1]
        for parameter, moments in zip(group["params"], states, strict=True):
            slope = known[parameter]
            second = (1 - decay) * slope**2
            if moments:
                second.add_(moments["exp_avg_sq"], alpha=decay)
            correction = 1 - decay ** (_number(moments["step"]) + 1 if moments else 1)
            known[parameter] = slope / (second / correction).sqrt_().add_(group["eps"])
    return [known[parameter] for parameter in parameters]


def _number(step: Tensor | float) -> Tensor | float:
    """As a Python number where that does not wait for a device."""
    return step if isinstance(step, Tensor) and step.device.type != "cpu" else float(step)
