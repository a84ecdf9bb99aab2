"""Sets the weights of all rows from one pass over the pool, at the end of the phase in which they were learned.

    ω_i = −T·(s_i − b) / (strength·c)          s_i the solver's score of row i, all of them at the same θ and φ

In training a row's weight comes of the few moments when it was visited: with one or two visits, of a policy that knew
little yet. This passes over the pool once at the end of the phase, without gradients and with dropout off, every
process its share, and sets the table of weights anew from the scores (`TableWeights.settle`); the prior stays. It costs
two forward passes a row.

    phases: [{name: weights, share: 0.4}, {name: policy, share: 0.6, learn_weights: false, learning_rate: 1.0}]
    callbacks: [{class_path: ClosingSweep, init_args: {phase: weights}}]

Rows that are refined by then are settled, too. Left out: weights that rows share; they have no entry to set.
"""

from __future__ import annotations

import time

from lightning.pytorch import Trainer

from lit_bilevel.callbacks.passes import ask_rows
from lit_bilevel.callbacks.phase_end import AtPhaseEnd
from lit_bilevel.callbacks.progress import say
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.weights.table import TableWeights


class ClosingSweep(AtPhaseEnd):
    """Sets the weights from scores of all rows at the end of a phase.

    Args:
        phase: its name; by default the last one that learns weights or prepares the solver.
        strength: the larger, the nearer the weights stay to the prior: with softmax weights, a row whose score is one
            mean deviation better than the mean weighs e^(1/strength) times its prior.
    """

    def __init__(self, phase: str | None = None, strength: float = 1.0):
        if not strength > 0:
            raise UserError(f"`strength` of `ClosingSweep` is {strength}; it must be above 0.")
        super().__init__(phase)
        self.strength = strength

    def check(self, trainer: Trainer, module: LitBilevel) -> None:
        if not (module.learns_weights and module.solver.scores_rest and isinstance(module.weights, TableWeights)):
            raise UserError(
                "`ClosingSweep` sets a table of weights from the scores of a solver at rest, and the run has"
                f" `{type(module.solver).__name__}` with `{type(module.weights).__name__}`; use `ValueFunction`"
                " with `SigmoidWeights`, for example, or leave the callback out."
            )

    def close(self, trainer: Trainer, module: LitBilevel, index: int) -> None:
        started = time.monotonic()
        own = module.phases[index].upper_weight
        upper_weight = own if own is not None else module.upper_weight  # scores are scaled, so its decay says nothing
        assert isinstance(module.weights, TableWeights)
        score_N = ask_rows(
            trainer, module, "pool", lambda problem, _: module.solver.scores_at_rest(problem), upper_weight=upper_weight
        )
        module.weights.settle(score_N, self.strength)
        say(
            f"all {module.weights.pool_rows:,} rows were scored once more and the weights set from that"
            f" ({time.monotonic() - started:.0f} s)"
        )
