"""Finds among a Trainer's callbacks those that cannot work here, that generate responses, and that score rows.

Those that cannot work are of Lightning: made for one optimizer, or writing beside a run's own files.
Example: `EMAWeightAveraging` averages all parameters of the module, of which the data weights are none to average; it
would fail in the first step. All others of Lightning's callbacks work (`tests/test_callbacks.py` goes through them).
Left out: callbacks of others, of which nothing is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import callbacks

from lit_bilevel.training.trainer import callbacks_of, find_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_bilevel.callbacks.phase_end import AtPhaseEnd
    from lit_bilevel.callbacks.refine import SelfRefine
    from lit_bilevel.callbacks.scored_prior import ScoredPrior

CANNOT: dict[type, str] = {
    callbacks.BaseFinetuning: (
        "it freezes and frees parameters in the middle of a run, and scores and checkpoints need the same ones all"
        " along; tune an adapter (`model.policy.lora`), or the whole policy"
    ),
    callbacks.BatchSizeFinder: "it tries sizes of one loader, and a step has rows of two; set `data.batch_size`",
    callbacks.GradientAccumulationScheduler: "a step has two optimizers; set `model.accumulate_grad_batches`",
    callbacks.LearningRateFinder: "a step has two optimizers; set `model.optimizer.init_args.lr`",
    callbacks.ModelPruning: "it takes parameters out of the module that the solver has in hand; prune `policy/`",
    callbacks.OnExceptionCheckpoint: (
        "it saves in the middle of a step, and the next run would begin there unasked; `BilevelCheckpoint` saves after"
        " whole steps (`checkpoint.every_n_steps`), and at SIGTERM and Ctrl-C"
    ),
    callbacks.SpikeDetection: "it needs one loss of a step, and there are two; `model.guard` watches them",
    callbacks.StochasticWeightAveraging: "it averages under one optimizer, and a step has two; leave it out",
    callbacks.WeightAveraging: (
        "it averages all parameters of the module, and data weights are no policy to average; leave it out (the"
        " monitor-best policy is what is exported)"
    ),
}


def unfit_callbacks(trainer: Trainer) -> list[str]:
    """What is wrong with those of a Trainer's callbacks that cannot work, one line for each."""
    problems = []
    for callback in callbacks_of(trainer):
        for kind, reason in CANNOT.items():
            if isinstance(callback, kind):
                problems.append(f"the callback `{type(callback).__name__}` cannot be used: {reason}")
    return problems


def drop_savers(trainer: Trainer) -> None:
    """Take out callbacks that would answer a refusal by saving a model that is not there yet."""
    for saver in find_callbacks(trainer, callbacks.OnExceptionCheckpoint):
        callbacks_of(trainer).remove(saver)


def refiners(trainer: Trainer) -> list[SelfRefine]:
    """The callbacks that generate responses: `SelfRefine`, or made from it."""
    return [
        cast("SelfRefine", callback)
        for callback in callbacks_of(trainer)
        if getattr(callback, "generates_responses", False)
    ]


def scorers(trainer: Trainer) -> list[ScoredPrior]:
    """The callbacks that score the rows before the first step: `ScoredPrior`, or made from it."""
    return [
        cast("ScoredPrior", callback) for callback in callbacks_of(trainer) if getattr(callback, "scores_rows", False)
    ]


def closers(trainer: Trainer) -> list[AtPhaseEnd]:
    """The callbacks that set weights at the end of a phase: `ClosingSweep`, `CleanProbability`, or made like them."""
    return [
        cast("AtPhaseEnd", callback) for callback in callbacks_of(trainer) if getattr(callback, "sets_weights", False)
    ]
