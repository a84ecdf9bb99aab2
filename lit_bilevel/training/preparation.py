"""Takes the steps of a phase in which the policy rests and only the solver's own state moves.

    {name: pool, share: 0.3, learning_rate: 0, learn_weights: false, prepare_solver: true}

The pool models of `CrossFit`, or that of `ValueFunction`, learn the pool rows; the policy takes no pass, and trusted
rows are not looked at. The step counts as a policy step, so `global_step`, schedules and checkpoints mean what they
always mean.

Left out: strategies and precisions whose optimizers step only after a backward pass (DeepSpeed, loss scaling). There a
phase with a rate of 0 computes what others do, and the policy stays where it is all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_bilevel.policy.problem import PolicyProblem

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim.lr_scheduler import LambdaLR

    from lit_bilevel.module import LitBilevel


def rests(module: LitBilevel) -> bool:
    """Whether the policy of a `LitBilevel` takes no pass in this step."""
    scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
    needs_backward = scaled or isinstance(module.trainer.strategy, DeepSpeedStrategy)
    return module.learns_weights and module.phase.rests and not needs_backward


def prepare_solver(module: LitBilevel, optimizer: LightningOptimizer, problem: PolicyProblem) -> dict[str, Tensor]:
    """Advance the solver, and the counters of a policy step.

    Args:
        module: the `LitBilevel`.
        optimizer: the policy's, as Lightning wraps it; no parameter has a gradient, so it only counts.
        problem: of this step.

    Returns:
        What is logged: the mean loss of the step's pool rows under the solver's own model, if it has one.
    """
    loss_B = module.solver.prepare(problem)
    for parameter in problem.parameters:  # a solver may have used them for derivatives of its own
        parameter.grad = None
    optimizer.step()
    cast("LambdaLR", module.lr_schedulers()).step()
    module.guard.count_taken()
    if loss_B is None:
        return {}
    folds = module.solver.folds
    batches = [batch for fold in range(folds) for batch in problem.lower[fold::folds]]  # as solvers return losses
    real_B = torch.cat([batch.row_B for batch in batches]) >= 0  # others only fill a shape
    # each process has its own rows of the window, and the mean over processes undoes the factor
    loss = (loss_B * real_B).sum() * (problem.engine.world_size / problem.lower[0].window_rows)
    return {"lower/solver_loss": module.trainer.strategy.reduce(loss, reduce_op="mean")}
