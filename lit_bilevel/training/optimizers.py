"""Makes the two optimizers of a run and the schedule of the policy's.

Left out: a schedule of the weights' optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.optim.lr_scheduler import LambdaLR

from lit_bilevel.errors import UserError
from lit_bilevel.training.schedule import learning_rate_factor
from lit_bilevel.training.strategies import takes_one_optimizer
from lit_bilevel.training.trainer import policy_of
from lit_bilevel.weights.optimizer import check_optimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_bilevel.module import LitBilevel


def make_optimizers(module: LitBilevel) -> tuple[list[Optimizer], list[dict[str, object]]]:
    """What Lightning is given by a `LitBilevel`: the inner optimizer and, if it takes two, the outer one; the schedule.

    Raises:
        UserError: for settings that an optimizer or the schedule does not take.
    """
    try:
        return _make(module)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"an optimizer or the schedule cannot be made: {error}; look at `model.optimizer`,"
            " `model.weight_optimizer`, `model.lr_scheduler` and `model.lr_scheduler_kwargs`."
        ) from error


def _make(module: LitBilevel) -> tuple[list[Optimizer], list[dict[str, object]]]:
    inner = module.optimizer(policy_of(module).trainable())
    parameters = list(module.weights.parameters())
    optimizers = [inner, module.weight_optimizer(parameters)] if parameters else [inner]
    if module.learns_weights:
        check_optimizer(module.weights, optimizers[-1])
        module.refinement.check()
    factor = learning_rate_factor(module, module.trainer.estimated_stepping_batches)
    scheduler = LambdaLR(inner, factor)
    if isinstance(module.trainer.strategy, DeepSpeedStrategy):
        # DeepSpeed casts every parameter that it is given; `begin_fit` puts these back
        module.uncast = [(parameter, parameter.detach().clone()) for parameter in parameters]
    if takes_one_optimizer(module.trainer.strategy):
        module.own_optimizer = optimizers.pop() if parameters else None
    return optimizers, [{"scheduler": scheduler, "interval": "step"}]
