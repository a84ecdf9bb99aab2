"""Callbacks of Lightning that cannot work with two alternating optimizers, or beside a run's own files.

Example: `EMAWeightAveraging` averages all parameters of the module, of which the data weights are none to average; it
would fail in the first step. All others of Lightning's callbacks work (`tests/test_callbacks.py` goes through them).
Left out: callbacks of others, of which nothing is known.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks

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


def unfit_callbacks(trainer: Any) -> list[str]:
    """What is wrong with those of a Trainer's callbacks that cannot work, one line for each."""
    problems = []
    for callback in trainer.callbacks:
        for kind, reason in CANNOT.items():
            if isinstance(callback, kind):
                problems.append(f"the callback `{type(callback).__name__}` cannot be used: {reason}")
    return problems


def drop_savers(trainer: Any) -> None:
    """Take out callbacks that would answer a refusal by saving a model that is not there yet."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, callbacks.OnExceptionCheckpoint)]
