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
    if module.solver.needs_upper_weight and module.initial_upper_weight == 0:
        problems.append(
            f"`{type(module.solver).__name__}` divides by `model.upper_weight`, which is 0; set it above 0, or use"
            " `OneStep`"
        )
    if module.solver.needs_upper_weight and module.upper_weight_decay > 0:
        problems.append(
            f"`model.upper_weight_decay` takes λ to 0, where `{type(module.solver).__name__}` has no meaning"
        )
    if module.accumulate_grad_batches < 1:
        problems.append(f"`model.accumulate_grad_batches` is {module.accumulate_grad_batches}; it must be at least 1")
    if problems:
        raise gathered("bad settings", problems)
