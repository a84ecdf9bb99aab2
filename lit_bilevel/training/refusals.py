"""Validates the settings of a module, and of the run it stands in, before anything is loaded.

    check_settings   values without meaning, such as λ = 1 with weights that learn
    check_flags      flags of the Trainer that are arguments of the module here
    check_run        what does not go together with strategy, precision and length; see also `strategies`

All problems of one check are gathered into one error. Left out: settings of the data, which the data module validates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_bilevel.errors import UserError, gather
from lit_bilevel.training.callbacks import drop_savers, refiners, unfit_callbacks
from lit_bilevel.training.effects import of_precision, without_callbacks, without_effect
from lit_bilevel.training.phases import problems_of
from lit_bilevel.training.schedule import most_falls
from lit_bilevel.training.sizes import find_oversized
from lit_bilevel.training.strategies import of_kernels, of_strategy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_bilevel.module import LitBilevel
    from lit_bilevel.solvers.base import BilevelSolver
    from lit_bilevel.weights.base import ExampleWeights


def check_settings(module: LitBilevel) -> None:
    """Refuse settings of a `LitBilevel` that have no meaning, all in one message.

    Raises:
        UserError: naming each of them.
    """
    problems = problems_of(module.phases)
    if not (0 <= module.upper_weight < 1 or (module.upper_weight == 1 and not module.learns_weights)):
        problems.append(
            f"`model.upper_weight` is {module.upper_weight}; it must be in [0, 1), or 1 with the `Mixing`"
            " solver, for training on validation rows alone"
        )
    if module.upper_weight_decay < 0:
        problems.append(f"`model.upper_weight_decay` is {module.upper_weight_decay}; it must be at least 0")
    if module.upper_weight_decay_every is not None and module.upper_weight_decay_every < 1:
        problems.append(
            f"`model.upper_weight_decay_every` is {module.upper_weight_decay_every}; it must be at least 1 step"
        )
    if module.solver.learns and not module.weights.learnable:
        problems.append(
            f"`model.weights` is `{type(module.weights).__name__}`, which learns nothing from scores, so `model.solver:"
            f" {type(module.solver).__name__}` would do nothing; use `Mixing`, or weights that learn"
        )
    for phase in module.phases:
        name, value = "`model.upper_weight`", module.upper_weight
        if phase.upper_weight is not None:
            name, value = f"`upper_weight` of the phase {phase.name!r}", phase.upper_weight
        for part in _need_upper_weight(module.weights, *([module.solver] if phase.runs_solver else [])):
            if value == 0:
                problems.append(
                    f"{name} is {value}, so λ is 0 in some step, where `{type(part).__name__}` has no meaning; change"
                    " it, or use `OneStep` with `SoftmaxWeights`"
                )
    problems += _of_phases(module)
    groups = module.refinement.template
    if groups.learnable and not module.weights.learnable:
        problems.append(
            f"`model.refined_weights` is `{type(groups).__name__}`, which learns from scores, and there are none where"
            f" `model.weights` is `{type(module.weights).__name__}`; use `BMOWeights` or `UniformWeights`"
        )
    for level in ("upper", "lower"):
        objective = getattr(module, f"{level}_objective")
        settings = module.policy_settings
        if objective.needs_reference and (settings.lora is None or settings.adapter == "continue"):
            problems.append(
                f"`model.{level}_objective` is `{type(objective).__name__}`, whose reference is the policy with its"
                " adapter switched off, and there is no new one; set `--model.policy.lora '{r: 16, alpha: 16}'` (and"
                " where `path` holds an adapter, `--model.policy.adapter merge`)"
            )
    problems += _out_of_range(module) + module.guard.settings.problems() + without_effect(module)
    if problems:
        raise gather("bad settings", problems)


def _need_upper_weight(*parts: BilevelSolver | ExampleWeights) -> list[BilevelSolver | ExampleWeights]:
    """Those of the solver and the weights that have no meaning where λ is 0."""
    return [part for part in parts if part.needs_upper_weight]


def _out_of_range(module: LitBilevel) -> list[str]:
    problems = []
    for name, least in (("accumulate_grad_batches", 1), ("max_new_tokens", 1), ("warmup_steps", 0)):
        if not (value := getattr(module, name)) >= least:
            problems.append(f"`model.{name}` is {value}; it must be at least {least}")
    if module.gradient_clip_val is not None and module.gradient_clip_val <= 0:
        problems.append(
            f"`model.gradient_clip_val` is {module.gradient_clip_val}; it must be above 0, or null for none"
        )
    if module.lr_scheduler in ("reduce_lr_on_plateau", "greedy"):
        problems.append(f"`model.lr_scheduler` is {module.lr_scheduler}, which follows a metric; use one of steps")
    return problems


def check_flags(trainer: Trainer) -> None:
    """Refuse flags of the Trainer that are arguments of the module here, and callbacks that cannot work with it.

    Raises:
        UserError: naming each of them.
    """
    given = {"gradient_clip_val": trainer.gradient_clip_val, "accumulate_grad_batches": trainer.accumulate_grad_batches}
    problems = [
        f"`trainer.{name}` is {value}; set `model.{name}` instead, for a step has two optimizers"
        for name, value in given.items()
        if value not in (None, 0, 1 if name == "accumulate_grad_batches" else None)
    ]
    problems += unfit_callbacks(trainer)
    if problems:
        drop_savers(trainer)
        raise gather("settings of another kind of training", problems)


def check_run(module: LitBilevel, stage: str) -> None:
    """Refuse what cannot work under the Trainer's strategy and precision, all in one message.

    Raises:
        UserError: naming each of them.
    """
    problems = of_kernels(module) + of_strategy(module, stage) + find_oversized(module, stage) + of_precision(module)
    if stage == "fit":
        problems += _of_decay(module) + _of_length(module) + without_callbacks(module, bool(refiners(module.trainer)))
    if module.trainer.precision == "16-true":
        problems.append(
            "`trainer.precision` is 16-true, in which small gradients become 0 and large ones overflow; use bf16-true,"
            " or 16-mixed, which scales the loss"
        )
    if problems:
        raise gather("this combination cannot run", problems)


def _of_phases(module: LitBilevel) -> list[str]:
    """Phases that the solver is not made for."""
    problems = []
    if module.solver.prepares_only and not any(phase.runs_solver for phase in module.phases):
        problems.append(
            f"`{type(module.solver).__name__}` runs in no phase; set `prepare_solver: true` in one, or use `Mixing`"
        )
    for phase in module.phases:
        if phase.learn_weights and module.solver.prepares_only:
            problems.append(
                f"`{type(module.solver).__name__}` has no scores in a step, and the phase {phase.name!r} learns weights"
                " from them; set its `learn_weights` to false, and `prepare_solver` to true in the phase in which the"
                " solver learns"
            )
        if phase.rests and getattr(module.solver, "learning_rate", 0) is None:
            problems.append(
                f"the policy rests in the phase {phase.name!r}, so its learning rate is 0, which"
                f" `{type(module.solver).__name__}` would take for its own model; set `model.solver.learning_rate`"
            )
    return problems


def _of_decay(module: LitBilevel) -> list[str]:
    groups = [module.refinement.template] if refiners(module.trainer) else []
    own = [phase for phase in module.phases if phase.upper_weight is None]
    solvers = [module.solver] if any(phase.runs_solver for phase in own) else []
    names = [type(part).__name__ for part in _need_upper_weight(*solvers, module.weights, *groups)] if own else []
    decay = module.upper_weight_decay
    if names and module.upper_weight == 0:
        return [f"`model.upper_weight` is 0, where `{names[0]}` for refined rows has no meaning; set it above 0"]
    if not names or decay == 0 or decay * most_falls(module) < module.upper_weight:
        return []
    falls, every = math.ceil(module.upper_weight / decay - 1e-9), module.upper_weight_decay_every
    last = f"in epoch {falls + 1}" if (module.trainer.max_epochs or -1) > 0 else "after some epochs"
    last = last if every is None else f"after {falls * every} policy steps"
    return [
        f"`model.upper_weight_decay` is {decay}, so λ is 0 {last}, where `{names[0]}` has no meaning; lower it, set"
        " `trainer.max_epochs` where it is not, or use `OneStep` with `SoftmaxWeights`"
    ]


def _of_length(module: LitBilevel) -> list[str]:
    if module.trainer.max_epochs != -1 or module.trainer.max_steps != -1:
        return []
    if len(module.phases) == 1:
        return []
    return [
        "`model.phases` are shares of a run whose length is not known; set `trainer.max_steps` or `trainer.max_epochs`"
    ]


def check_precision(asked: Any, trainer: Trainer) -> None:
    """Refuse a precision that Lightning has put another one in place of.

    Raises:
        UserError: for loss scaling on a CPU.
    """
    if str(asked) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
        raise UserError(
            f"`trainer.precision` is {asked}, which CPUs do not have; use bf16-mixed, or `trainer.accelerator: gpu`."
        )
