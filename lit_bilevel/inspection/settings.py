"""Flattens the settings of a run to names and plain values: for the HParams tab, the model card, the summary.

Solvers, weightings, objectives, choosers of rows, response weights and `LitBilevel` keep the arguments of their
constructors as attributes of the same name, so a class's signature says what to read. Two arguments of `LitBilevel` are
kept elsewhere, for their names are those of what they make: `policy`, the model, is made of `policy_settings`, and
`guard`, the watcher, has its limits in `guard.settings`. Left out: settings that are neither numbers nor strings;
`config.yaml` has everything.
"""

from __future__ import annotations

import inspect

from lightning.pytorch import Trainer

from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.origin import adapter_of
from lit_bilevel.training.callbacks import refiners
from lit_bilevel.training.phases import Phase
from lit_bilevel.training.trainer import data_of

Plain = str | int | float | bool


def run_settings(trainer: Trainer, module: LitBilevel) -> dict[str, Plain]:
    """What a run was set to; call it once optimizers exist."""
    settings: dict[str, Plain] = {"policy": module.policy_settings.path}
    adapter = adapter_of(module.policy_settings)
    if adapter is not None:
        settings |= {"policy.base": adapter.base, "policy.adapter": module.policy_settings.adapter or "continue"}
    if module.policy_settings.lora is not None:
        settings["policy.lora_r"] = module.policy_settings.lora.r
    settings |= own_settings("solver", module.solver) | own_settings("weights", module.weights)
    for level in ("upper_objective", "lower_objective"):
        settings |= own_settings(level, getattr(module, level))
    own = [] if module.own_optimizer is None else [module.own_optimizer]  # the strategy takes one optimizer
    for name, optimizer in zip(("optimizer", "weight_optimizer"), [*trainer.optimizers, *own], strict=False):
        settings[name] = type(optimizer).__name__
        settings[f"{name}.lr"] = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    settings["upper_weight"] = module.upper_weight
    if len(module.phases) > 1:
        settings["phases"] = "; ".join(map(in_words, module.phases))
    for name in ("upper_weight_decay", "warmup_steps", "accumulate_grad_batches"):
        settings[name] = getattr(module, name)
    settings["lr_scheduler"] = module.lr_scheduler
    for name in ("gradient_clip_val", "upper_weight_decay_every"):
        if getattr(module, name) is not None:
            settings[name] = getattr(module, name)
    data = data_of(trainer)
    for name in ("batch_size", "upper_batch_size", "max_length", "seed"):
        settings[f"data.{name}"] = getattr(data, name)
    for callback in refiners(trainer):
        settings |= own_settings("refine", callback.choose) | {"refine.responses": callback.responses}
        settings |= own_settings("response_weights", module.refinement.rule)
    settings["precision"] = str(trainer.precision)
    settings["processes"] = trainer.world_size
    return settings


def own_settings(name: str, thing: object) -> dict[str, Plain]:
    """The class of an object, and the plain ones of its constructor's arguments."""
    settings: dict[str, Plain] = {name: type(thing).__name__}
    for argument in inspect.signature(type(thing)).parameters:
        value = getattr(thing, argument, None)
        if isinstance(value, str | int | float | bool):
            settings[f"{name}.{argument}"] = value
    return settings


def in_words(phase: Phase) -> str:
    """A phase and its settings, on one line."""
    parts = [f"{phase.name}: {phase.share:.0%} of the steps"]
    parts += [] if phase.upper_weight is None else [f"λ = {phase.upper_weight:g}"]
    parts += [] if phase.learning_rate is None else [f"learning rate × {phase.learning_rate:g}"]
    if not phase.learn_weights:
        parts.append("weights stay, the solver runs" if phase.prepare_solver else "weights stay")
    return ", ".join(parts)
