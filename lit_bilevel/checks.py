"""Settings of the module that have no meaning, refused before anything is loaded.

Left out: settings of the data, which the data module checks itself.
"""

from __future__ import annotations

from typing import Any

from lit_bilevel.errors import gathered


def check_settings(module: Any) -> None:
    """Refuse settings of a `LitBilevel` that have no meaning, all in one message.

    Raises:
        UserError: naming each of them.
    """
    problems = []
    if not (0 <= module.initial_upper_weight < 1 or (module.initial_upper_weight == 1 and not module.learns_weights)):
        problems.append(
            f"`model.upper_weight` is {module.initial_upper_weight}; it must be in [0, 1), or 1 with the `Mixing`"
            " solver, for training on validation rows alone"
        )
    if module.upper_weight_decay < 0:
        problems.append(f"`model.upper_weight_decay` is {module.upper_weight_decay}; it must be at least 0")
    for part in (module.solver, module.weights):
        if not part.needs_upper_weight:
            continue
        for name, value, wrong in (
            ("upper_weight", module.initial_upper_weight, module.initial_upper_weight == 0),
            ("upper_weight_decay", module.upper_weight_decay, module.upper_weight_decay > 0),
            ("upper_weight_start", module.upper_weight_start, module.upper_weight_start > 0),
        ):
            if wrong:
                problems.append(
                    f"`model.{name}` is {value}, so λ is 0 in some step, where `{type(part).__name__}` has no meaning;"
                    " change it, or use `OneStep` with `SoftmaxWeights`"
                )
    if module.accumulate_grad_batches < 1:
        problems.append(f"`model.accumulate_grad_batches` is {module.accumulate_grad_batches}; it must be at least 1")
    if module.guard.limit < 1:
        problems.append(f"`model.max_skipped_steps` is {module.guard.limit}; it must be at least 1")
    if problems:
        raise gathered("bad settings", problems)
