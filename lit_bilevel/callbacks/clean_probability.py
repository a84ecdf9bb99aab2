"""Sets the weights by the probability that a row is clean, by its prior and two pool models, at the end of a phase.

    w_i = p_i^s / mean p^s        p_i the probability that row i is clean, by its prior score, its loss under the
                                  untouched policy, and its loss under a pool model that never learned it

What a loss under the pool model means depends on the data. Where junk is of a kind (generic answers, gibberish), the
model learns it, and a low loss speaks against a row. Where most answers are right and the others wrong each in its own
way, it learns what is right, and a low loss speaks for a row. The trusted rows tell which: no model learned them, nor
did a pool row's own model learn it (`CrossFit`), so their losses can be compared (`scores/presence.py`). The run says
which share of the pool is clean, and how much of the weight is left on the others.

At s = 1 a row weighs as much as is expected of it, and wrong rows that look right keep their part. A larger s takes it
from them, and from clean rows that look alike. For example, of rows with p = 0.9 and as many with 0.3, 40 % are wrong;
they keep 25 % of the weight at s = 1, and 16 % at s = 2. Larger ones were no better on the toy, and worse where a poor
row still teaches something, as a cut text does.

    phases: [{name: pool, share: 0.3, learning_rate: 0, learn_weights: false, prepare_solver: true}, {name: policy, …}]
    callbacks: [{class_path: ScoredPrior}, {class_path: CleanProbability}]

It costs a forward pass a row. Left out: what weights have learned before, which it would overwrite.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.callbacks.passes import ask_rows
from lit_bilevel.callbacks.phase_end import AtPhaseEnd
from lit_bilevel.callbacks.progress import say
from lit_bilevel.callbacks.warm_start import WarmStart
from lit_bilevel.errors import UserError, gather
from lit_bilevel.module import LitBilevel
from lit_bilevel.scores.combination import normal_scores
from lit_bilevel.scores.density import LEAST_TRUSTED
from lit_bilevel.scores.presence import Presence, presence
from lit_bilevel.training.callbacks import scorers
from lit_bilevel.training.trainer import data_of, find_callbacks
from lit_bilevel.weights.base import effective_size

KNOWN = 0.6
"""Width of the interval of the clean share from which on nothing is said that hangs on it."""


class CleanProbability(AtPhaseEnd):
    """Sets the weights by the probability that a row is a clean one, at the end of a phase.

    Args:
        phase: its name; by default the last one that prepares the solver.
        sharpness: s, how far apart the weights are: 0 is equal ones, 1 the probabilities themselves.
    """

    def __init__(self, phase: str | None = None, sharpness: float = 1.0):
        super().__init__(phase)
        if not 0 <= sharpness < float("inf"):
            raise UserError(f"`sharpness` of `CleanProbability` is {sharpness}; it must be at least 0.")
        self.sharpness = sharpness
        self.probability_N: np.ndarray | None = None

    def state_dict(self) -> dict[str, Any]:
        """Also what it found, from which `SecondLook` goes on."""
        found = {} if self.probability_N is None else {"probability": torch.from_numpy(self.probability_N)}
        return {**super().state_dict(), **found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "probability" in state_dict:
            self.probability_N = state_dict["probability"].numpy()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # what an earlier one left
            self.probability_N = None
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Trainer, module: LitBilevel) -> None:
        problems = []
        if module.solver.folds == 1:
            problems.append(f"it needs the solver `CrossFit`, and the run has `{type(module.solver).__name__}`")
        if not scorers(trainer):
            problems.append("it needs the callback `ScoredPrior`; add it to `trainer.callbacks`")
        if find_callbacks(trainer, WarmStart):
            problems.append("it would overwrite the weights of `WarmStart`; leave one of them out")
        if any(phase.learn_weights for phase in module.phases[: self.phase_index(module) + 1]):
            problems.append(
                "a phase up to its own learns weights, which it would overwrite; set `learn_weights: false` there"
            )
        if (rows := len(data_of(trainer).sets["upper"])) < LEAST_TRUSTED:
            problems.append(
                f"it needs {LEAST_TRUSTED} validation rows that train the weights, and there are {rows}; give more of"
                " them, or a smaller `data.monitor_fraction`"
            )
        if problems:
            raise gather("`CleanProbability` cannot run", problems)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self._done:
            scorers(trainer)[0].both_scores()  # now, and not after the phase

    def close(self, trainer: Trainer, module: LitBilevel, index: int) -> None:
        started = time.monotonic()
        pool, trusted = scorers(trainer)[0].both_scores()
        pool["pool_model"] = -held_out_losses(trainer, module, "pool")
        trusted["pool_model"] = -held_out_losses(trainer, module, "upper")
        found = clean_rows(pool, trusted)
        self.probability_N = found.probability_N
        weight_N = torch.from_numpy(found.probability_N**self.sharpness)
        module.weights.set_prior(weight_N)
        size = effective_size(weight_N)
        counts = ", ".join(f"{name} {slope:+.2f}" for name, slope in zip(pool, found.slopes, strict=True))
        rows, known = len(weight_N), len(trusted["pool_model"])
        left = 1 - np.average(found.probability_N, weights=weight_N)
        rest = f"; the others are left about {left:.0%} of the weight" if found.most - found.least <= KNOWN else ""
        say(
            f"about {found.share:.0%} of {rows:,} pool rows ({found.least:.0%} to {found.most:.0%}) are like the"
            f" {known:,} trusted ones ({counts}){rest}; effective size {size / rows:.0%} of the pool"
            f" ({time.monotonic() - started:.0f} s)"
        )


def clean_rows(pool: dict[str, np.ndarray], trusted: dict[str, np.ndarray]) -> Presence:
    """The probability of every pool row to be a clean one, and the share of these.

    Args:
        pool: [N] scores by name.
        trusted: [M] the same of trusted rows that no model has learned.
    """
    # by ranks in the pool, as in the prior
    pool_NF = np.stack([normal_scores(pool[name]) for name in pool], axis=1)
    return presence(pool_NF, np.stack([normal_scores(trusted[name], pool[name]) for name in pool], axis=1))


def held_out_losses(trainer: Trainer, module: LitBilevel, name: str) -> np.ndarray:
    """[rows] losses of a set's rows under pool models that did not learn them, float64, on all processes alike.

    Args:
        trainer: Lightning's, in a fit.
        module: with its solver's state.
        name: of the set.

    Raises:
        UserError: if most losses are not finite.
    """
    # trusted rows as well are asked of one model: a mean over models would be less noisy than what pool rows have
    loss_N = ask_rows(trainer, module, name, module.solver.losses_at_rest, module.solver.folds)
    rows = len(loss_N)
    if wrong := int((~loss_N.isfinite()).sum()):
        told = f"the loss of {wrong:,} of {rows:,} rows under a pool model is not finite"
        if 2 * wrong > rows:
            raise UserError(f"{told}; lower `model.solver.learning_rate`, or use another `trainer.precision`.")
        rank_zero_warn(f"{told}, so it says nothing of them; a lower `model.solver.learning_rate` may help.")
    return loss_N.cpu().numpy()
