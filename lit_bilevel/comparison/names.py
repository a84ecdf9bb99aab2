"""What the parts of a method's name stand for: flags of `lit-bilevel fit`, classes, callbacks.

Left out: how the parts are put together, which `methods` does, and filters, which are objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_bilevel.errors import UserError

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
SOLVERS = {
    "one_step": "OneStep",
    "penalty": "Penalty",
    "value_function": "ValueFunction",
    "implicit": "Implicit",
}
NEEDS_VALIDATION = ("penalty", "value_function")  # their scores have no meaning where λ is 0
WEIGHTS = {
    "softmax": "SoftmaxWeights",
    "sigmoid": "SigmoidWeights",
    "source": "SourceWeights",
    "network": "NetworkWeights",
}
RULES = {
    "uniform": "Uniform",
    "token": "Token",
    "sequence": "Sequence",
    "length_normalised": "LengthNormalised",
    "self_normalised": "SelfNormalised",
    "aligned": "Aligned",
    "agreement": "Agreement",
}
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


def known(name: str, names: Sequence[str] | Mapping[str, str], what: str) -> str:
    """The name itself.

    Raises:
        UserError: with the names there are.
    """
    if name not in names:
        raise UserError(f"unknown {what} {name!r}; there are: {', '.join(names)}.")
    return name
