"""Asks the policy about every row again while it is trained, and sets the weights by what it has learned.

    p_i ← P(clean_i | p_i, ℓ_i now, ℓ_i before training)        w_i = p_i^s / mean p^s

`CleanProbability` judges rows by models that know the pool a little. Where the task has to be learned first, as in
arithmetic, the policy knows much more of it halfway through its own training. This costs one forward pass a row. How
the losses count is told by the rows themselves (`scores/learned.py`); where they tell nothing, the weights stay.

    callbacks: [ScoredPrior, CleanProbability, {class_path: SecondLook, init_args: {after: 0.5}}]

Left out: more than one look.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_bilevel.callbacks.clean_probability import CleanProbability
from lit_bilevel.callbacks.passes import ask_rows
from lit_bilevel.callbacks.phase_end import AtPhaseEnd
from lit_bilevel.callbacks.progress import say
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.scores.combination import normal_scores
from lit_bilevel.scores.learned import learned_since
from lit_bilevel.training.callbacks import scorers
from lit_bilevel.training.phases import borders
from lit_bilevel.training.trainer import find_callbacks
from lit_bilevel.weights.base import effective_size


class SecondLook(AtPhaseEnd):
    """Sets the weights anew in the course of the phase in which the policy is trained.

    Args:
        phase: its name; by default the last one.
        after: share of the phase's steps after which rows are asked again.
    """

    needs_solver = False

    def __init__(self, phase: str | None = None, after: float = 0.5):
        super().__init__(phase)
        if not 0 < after < 1:
            raise UserError(f"`after` of `SecondLook` is {after}; it must be above 0 and below 1.")
        self.after = after

    def check(self, trainer: Trainer, module: LitBilevel) -> None:
        first = find_callbacks(trainer, CleanProbability)
        if not first:
            raise UserError("`SecondLook` goes on from the callback `CleanProbability`; add it to `trainer.callbacks`.")
        if first[0].phase_index(module) >= self.phase_index(module):
            raise UserError(
                "the phase of `SecondLook` is not after that of `CleanProbability`; name one that trains the policy."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        (first,) = find_callbacks(trainer, CleanProbability)
        if first.is_done and first.probability_N is None and not self.is_done:
            raise UserError(
                "`SecondLook` has no probabilities to go on from: the checkpoint is of a run without"
                " `CleanProbability`, or of an older version; continue from a step before its phase was over, or leave"
                " `SecondLook` out."
            )

    def close(self, trainer: Trainer, module: LitBilevel, index: int) -> None:
        started = time.monotonic()
        (first,) = find_callbacks(trainer, CleanProbability)
        known_N = first.probability_N
        assert known_N is not None
        loss_N = ask_rows(trainer, module, "pool", lambda problem, _: problem.lower_losses()).cpu().numpy()
        before_N = scorers(trainer)[0].both_scores()[0]["policy"]
        found = learned_since(known_N, normal_scores(-loss_N), normal_scores(before_N))
        if not found.shift:
            say(
                "what the policy has learned since does not tell clean rows from others, so the weights stay"
                f" ({time.monotonic() - started:.0f} s)"
            )
            return
        weight_N = torch.from_numpy(found.probability_N**first.sharpness)
        module.weights.set_prior(weight_N)
        moved = float(np.abs(found.probability_N - known_N).mean())
        say(
            f"by what the policy has learned since (shift {found.shift:+.2f}), probabilities of rows to be clean moved"
            f" by {moved:.2f} in the mean; effective size {effective_size(weight_N) / len(weight_N):.0%} of the pool"
            f" ({time.monotonic() - started:.0f} s)"
        )

    def phase_index(self, module: LitBilevel) -> int:
        return len(module.phases) - 1 if self.phase is None else super().phase_index(module)

    def _border(self, trainer: Trainer, module: LitBilevel) -> float:
        ends = [0.0, *borders(module.phases, trainer.estimated_stepping_batches)]
        begin, end = ends[(index := self.phase_index(module))], ends[index + 1]
        return math.ceil(begin + self.after * (end - begin))
