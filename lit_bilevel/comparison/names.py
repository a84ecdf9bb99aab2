"""Tables of what the parts of a method's name stand for: flags of `lit-bilevel fit`, classes, callbacks.

A class is named in short, as the comparison's own names are made from those of the classes, or by its path:

    one_step → OneStep      softmax → SoftmaxWeights      my_package.solvers.Newton → that class

Left out: how the parts are put together, which `methods` does.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lit_bilevel.refinement.response_weights
import lit_bilevel.solvers
import lit_bilevel.weights
from lit_bilevel.comparison.filters import CleanRows, Filter, LearnedWeights, PassScore, RandomRows
from lit_bilevel.errors import UserError
from lit_bilevel.refinement.consensus import Agreement
from lit_bilevel.refinement.response_weights import ResponseWeights
from lit_bilevel.solvers import BilevelSolver
from lit_bilevel.weights import ExampleWeights

if TYPE_CHECKING:
    from types import ModuleType

CONSTANT = ("--model.upper_weight_decay=0",)  # and the phases' λ, see `Method.constant`
UNIFORM = ("--model.weights=UniformWeights", "--model.solver=Mixing")
FIXED = ("--model.weights=SigmoidWeights", *UNIFORM[1:])
OF_RESPONSES = ("--model.response_weights=null", "--model.refined_weights=null")  # refused where nothing is generated
CONSTANT_SHARE = ("constant_mixing", "pool_only", "validation_only", "bmo")
BASELINES = {
    "mixing": (),
    "constant_mixing": (),
    "pool_only": ("--model.upper_weight=0", *CONSTANT),
    "validation_only": ("--model.upper_weight=1", *CONSTANT, "--trainer.val_check_interval=10"),
}
SHARES = ("mixing", "mixing@0.1", "mixing@0.25", "mixing@0.5")
SEAL = "penalty@softmax"
REFINE: dict[str, Any] = {
    "class_path": "SelfRefine",
    "init_args": {
        "choose": {"class_path": "LowestFraction", "init_args": {"fraction": 0.4}},
        "responses": 4,
        "sampling": {"max_new_tokens": 64},
    },
}
EARLY_STOPPING: dict[str, Any] = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "monitor/loss", "patience": 15},
}
STOPWATCH: dict[str, Any] = {"class_path": "lit_bilevel.comparison.stopwatch.Stopwatch"}


def short_names(room: ModuleType, kind: type, suffix: str = "") -> dict[str, type[Any]]:
    """The concrete classes of one kind in a room, by short names such as `one_step` and `softmax`.

    Args:
        room: a module.
        kind: their base class.
        suffix: what all of their names end in.
    """
    classes = [value for name, value in vars(room).items() if inspect.isclass(value) and not name.startswith("_")]
    chosen = [value for value in classes if issubclass(value, kind) and not inspect.isabstract(value)]
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", c.__name__.removesuffix(suffix)).lower(): c for c in chosen}


SOLVERS = {
    name: c
    for name, c in short_names(lit_bilevel.solvers, BilevelSolver).items()
    if c.learns and not c.prepares_only  # a method of its own has scores in every step
}
WEIGHTS = {name: c for name, c in short_names(lit_bilevel.weights, ExampleWeights, "Weights").items() if c.learnable}
RULES = short_names(lit_bilevel.refinement.response_weights, ResponseWeights, "Ratio") | {"agreement": Agreement}
FILTERS: dict[str, type[Any]] = {"oracle": CleanRows, "random": RandomRows}
"""Filters that need nothing said: those of whole runs and of scores have names with a colon."""
FILTERS |= {
    name: c
    for name, c in short_names(lit_bilevel.comparison.filters, Filter).items()
    if c not in (CleanRows, RandomRows, LearnedWeights, PassScore)
}


def find_class(name: str, names: Mapping[str, type[Any]], kinds: tuple[type, ...], what: str) -> type[Any]:
    """The class of a short name, or at a path.

    Args:
        name: `one_step`, or `my_package.solvers.Newton`.
        names: short names.
        kinds: base classes, of which one at a path must have one.
        what: what it is, for errors.

    Raises:
        UserError: where there is none.
    """
    if "." not in name:
        return names[check_name(name, names, what)]
    home, _, own = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(home), own)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the {what} {name!r} cannot be imported ({error}); check its path.") from error
    if not (inspect.isclass(cls) and issubclass(cls, kinds)):
        wanted = " or ".join(f"`{kind.__name__}`" for kind in kinds)
        raise UserError(f"{name!r} is no class made from {wanted}; name one that is.")
    return cls


def flag_of(kind: type) -> str:
    """How a flag names a class: by its name where that is known without a path."""
    own = kind.__module__.startswith("lit_bilevel.")
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


def share(name: str) -> float:
    """λ of `mixing@λ`.

    Raises:
        UserError: if it is not a number between 0 and 1.
    """
    text = name.partition("@")[2]
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"the share {text!r} of {name!r} is not a number between 0 and 1, such as mixing@0.25.")
    return value


def check_name(name: str, names: Iterable[str], what: str) -> str:
    """The name itself.

    Raises:
        UserError: with the names there are.
    """
    if name not in names:
        raise UserError(f"unknown {what} {name!r}; there are: {', '.join(names)}.")
    return name
