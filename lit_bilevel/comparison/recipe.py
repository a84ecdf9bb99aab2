"""The phases of a compared run: a recipe's own, or what is left of the configuration's for methods of other kinds.

    --config configs/curate.yaml     `curate` has the configuration's weights, solver, phases and callbacks; the others
                                     have one phase, with λ of its last
    any other configuration          `curate` takes these four from `configs/curate.yaml`; the others have its phases,
                                     those with a constant λ with their own in each

The last phase of a recipe trains the policy: it has as many steps as the runs of the others. Left out: rates.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_bilevel.resources import locate

Settings = Sequence[Mapping[str, Any]]

CALLBACKS = ("ScoredPrior", "CleanProbability", "ClosingSweep", "SecondLook")
"""Callbacks that belong to a recipe's phases."""


def read_parts(settings: Namespace) -> tuple[Settings | None, Settings]:
    """The phases and the callbacks of a configuration that was parsed."""
    own = settings.trainer.callbacks
    phases, callbacks = settings.model.phases, own if isinstance(own, list) else [own] if own else []
    plain = [phase.as_dict() for phase in phases] if phases else None
    return plain, [c.as_dict() if isinstance(c, Namespace) else dict(c) for c in callbacks]


def is_recipe(phases: Settings | None) -> bool:
    """Whether phases have rates of their own, and so more to do than to say when weights and λ start."""
    return any(phase.get("learning_rate") is not None for phase in phases or ())


def recipe_of(path: str) -> dict[str, Any]:
    """The settings in the file of a recipe."""
    return yaml.safe_load(Path(locate(path)).read_text(encoding="utf-8"))


def recipe_flags(path: str, configured: Settings | None, steps: int) -> list[str]:
    """Flags for a run of a recipe.

    Args:
        path: its file.
        configured: the phases of the configuration.
        steps: policy steps of the runs of other methods.
    """
    flags: list[str] = []
    if not is_recipe(configured):
        model = recipe_of(path)["model"]
        configured = model["phases"]
        settings = {name: model[name] for name in ("phases", "weights", "solver")}
        # a name of a class stands as it is: quotes around it would belong to it
        flags += [f"--model.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items()]
    assert configured is not None
    whole = math.ceil(steps / configured[-1]["share"] - 1e-6)
    return [*flags, f"--trainer.max_steps={whole}", "--trainer.max_epochs=-1"]


def other_flags(configured: Settings | None, constant: bool) -> list[str]:
    """Flags for a run of another method, before its own.

    Args:
        configured: the phases of the configuration.
        constant: whether λ is that of the module all along.
    """
    if not configured:
        return []
    if is_recipe(configured):
        last = configured[-1].get("upper_weight")
        return ["--model.phases=null", *([] if last is None else [f"--model.upper_weight={last}"])]
    if not constant:
        return []
    return [f"--model.phases={json.dumps([{**phase, 'upper_weight': None} for phase in configured])}"]


def callbacks_of(path: str, configured: Settings) -> list[Mapping[str, Any]]:
    """The configuration's callbacks with those of a recipe, or without them where there is none.

    Args:
        path: file of the recipe; empty for other methods.
        configured: the configuration's own.
    """
    others = [callback for callback in configured if not is_one_of(callback, *CALLBACKS)]
    if not path:
        return others
    if len(others) < len(configured):
        return list(configured)
    return [*others, *recipe_of(path)["trainer"]["callbacks"]]


def is_one_of(callback: Mapping[str, Any], *classes: str) -> bool:
    """Whether a callback is of one of these classes, by whatever path."""
    return str(callback["class_path"]).rpartition(".")[2] in classes
