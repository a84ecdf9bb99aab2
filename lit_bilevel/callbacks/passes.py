"""Passes over a set outside Lightning's loops, for callbacks that measure the policy as it is.

    with evaluating(trainer, module) as made:
        for batch in map(made, loader):
            module.policy.losses(objective, batch)

    loss_N = ask_rows(trainer, module, "pool", module.solver.losses_at_rest, folds=2)

Left out: scores of rows before training; `scores/` has those.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_bilevel.data.examples import Window
from lit_bilevel.data.folds import split_folds
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.rest import RestingProblem
from lit_bilevel.training.engine import lightning_engine
from lit_bilevel.training.evaluation import Evaluation
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.types import Batch, Features


@contextlib.contextmanager
def evaluating(trainer: Trainer, module: LitBilevel) -> Iterator[Callable[[Any], Batch]]:
    """A pass outside Lightning's loops: without gradients, with dropout off, and with the random state left as it was.

    Yields what turns an item of an evaluation loader into a batch on the device.
    """
    policy = policy_of(module)
    data, training = data_of(trainer), policy.training
    policy.eval()
    try:  # a loader draws a number even where it shuffles nothing
        with torch.random.fork_rng(devices=[]), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield lambda window: data.on_before_batch_transfer(window, 0).to(module.device)
    finally:
        policy.train(training)


def ask_rows(
    trainer: Trainer,
    module: LitBilevel,
    name: str,
    ask: Callable[[RestingProblem, int], Tensor],
    folds: int = 1,
    upper_weight: float = 0.5,
) -> Tensor:
    """[rows] one number of every row of a set, float64, on all processes alike.

    Args:
        trainer: Lightning's, in a fit.
        module: with its solver's state.
        name: of the set.
        ask: gives the numbers [B] of some rows of one fold, from these rows at rest and the fold.
        folds: into how many the rows are dealt out.
        upper_weight: λ at which the rows are seen.
    """
    policy, data = policy_of(module), data_of(trainer)
    inner, _ = module._optimizers()
    engine = lightning_engine(module)
    number_N = torch.zeros(len(data.sets[name]), dtype=torch.float64, device=module.device)
    with evaluating(trainer, module) as made:
        for window in data.evaluation_loader(name):
            for fold, examples in enumerate(split_folds(window.examples, folds)):  # as many on every process
                batch = made(Window(examples, window.rows))
                problem = RestingProblem(policy, batch, upper_weight, inner.optimizer, engine, module.lower_objective)
                found_B, real_B = ask(problem, fold).double(), batch.row_B >= 0
                number_N.index_add_(0, batch.row_B.clamp_min(0), torch.where(real_B, found_B, 0.0))
    # every row is on one process
    return trainer.strategy.reduce(number_N, reduce_op="sum") if trainer.world_size > 1 else number_N


def score_pool(trainer: Trainer, module: LitBilevel) -> None:
    """Show the weights every pool row's loss under the final policy, on all processes alike."""
    policy = policy_of(module)
    loader = data_of(trainer).evaluation_loader("pool")
    with evaluating(trainer, module) as made:
        for batch in map(made, loader):
            loss_B = policy.losses(module.lower_objective, batch)
            # one exchange a batch; float64 holds row numbers exactly
            table = torch.stack([batch.row_B, batch.source_B, batch.length_B, loss_B], dim=1).double()
            if trainer.world_size > 1:
                table = trainer.strategy.all_gather(table).flatten(0, 1)
            row, source, length, loss = table[table[:, 0] >= 0].unbind(1)
            module.weights.score(Features(row.long(), source.long(), length.long(), loss))


def test_losses(trainer: Trainer, module: LitBilevel) -> dict[str, float]:
    """What `test` would log for the policy as it is, on all processes alike."""
    policy = policy_of(module)
    metrics: dict[str, Any] = {}
    limit = trainer.limit_test_batches
    loader = data_of(trainer).test_dataloader()
    count = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    evaluation = Evaluation(module.lower_objective, module.upper_objective).to(module.device)
    with evaluating(trainer, module) as made:
        for window in itertools.islice(loader, count):
            metrics = evaluation("test", policy, made(window))
    return {name: float(metric.compute()) for name, metric in metrics.items()}
