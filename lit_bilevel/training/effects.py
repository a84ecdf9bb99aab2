"""Finds settings that would do nothing beside the others, so that they can be refused by name.

Left out: what a shared configuration brings along for other methods, `weight_optimizer` above all. Where no weights are
learned the first lines of a run say so, and nothing is lost by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_bilevel.training.callbacks import closers, scorers
from lit_bilevel.training.phases import unused_preparation

if TYPE_CHECKING:
    from lit_bilevel.module import LitBilevel

FLAT = ("constant", "constant_with_warmup")
TYPES = {"16-true": "float16", "bf16-true": "bfloat16", "64-true": "float64"}


def without_effect(module: LitBilevel) -> list[str]:
    """Settings of a `LitBilevel` that others of its settings leave without effect, and what to do."""
    problems = []
    if module.lr_scheduler_kwargs and module.lr_scheduler in FLAT:
        problems.append(
            f"`model.lr_scheduler_kwargs` is {module.lr_scheduler_kwargs}, and the schedule"
            f" {module.lr_scheduler!r} takes none; leave it out, or choose another `model.lr_scheduler`"
        )
    own = [phase for phase in module.phases if phase.upper_weight is None]
    if module.upper_weight_decay > 0 and (module.upper_weight == 0 or not own):
        why = "λ is 0 (`model.upper_weight`)" if own else "every phase has an `upper_weight` of its own, which stays"
        problems.append(f"`model.upper_weight_decay` is {module.upper_weight_decay}, but {why}; set it to 0")
    return problems


def without_callbacks(module: LitBilevel, refines: bool) -> list[str]:
    """Settings of generated responses in a fit that generates none, and of scores in one that scores no rows.

    Args:
        module: the `LitBilevel`.
        refines: whether the fit has `SelfRefine`.
    """
    problems = [
        f"`model.{name}` is `{type(value).__name__}`, but nothing is generated without the callback `SelfRefine`; add"
        f" it to `trainer.callbacks`, or set `model.{name}` to null"
        for name in ("response_weights", "refined_weights")
        if (value := getattr(module, name)) is not None and not refines
    ]
    return problems + _without_scores(module) + _without_sweep(module)


def of_precision(module: LitBilevel) -> list[str]:
    """A type of the policy that the Trainer's precision turns into another."""
    asked, made = module.policy_settings.dtype, TYPES.get(module.trainer.precision)
    if made is None or asked in ("auto", made):
        return []
    return [
        f"`model.policy.dtype` is {asked}, and `trainer.precision` {module.trainer.precision} makes everything {made};"
        " leave one of them out"
    ]


def _without_scores(module: LitBilevel) -> list[str]:
    """Weights that read scores of rows in a fit that scores none."""
    names = module.weights.columns
    if not names or scorers(module.trainer):
        return []
    return [
        f"`columns` of `model.weights` are {', '.join(names)}, and nothing scores rows without the callback"
        " `ScoredPrior`; add it to `trainer.callbacks`, or leave the columns out"
    ]


def _without_sweep(module: LitBilevel) -> list[str]:
    """A solver that is prepared for nothing."""
    name = unused_preparation(module.phases)
    if name is None or closers(module.trainer):
        return []
    closer = "CleanProbability" if module.solver.prepares_only else "ClosingSweep"
    return [
        f"the phase {name!r} has `prepare_solver`, and no later one learns weights; add the callback `{closer}` to"
        " `trainer.callbacks`, or leave `prepare_solver` out"
    ]
