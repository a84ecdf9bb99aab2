"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A wrong setting, file or combination; the message says the fact, the cause and the remedy."""


def gather(title: str, problems: list[str], limit: int = 20) -> UserError:
    """One error for many problems, with the first `limit` of them listed."""
    if len(problems) == 1:
        return UserError(f"{title}: {problems[0]}")
    shown = "".join(f"\n  {problem}" for problem in problems[:limit])
    more = f"\n  … and {len(problems) - limit} more" if len(problems) > limit else ""
    return UserError(f"{title}: {len(problems)} problems{shown}{more}")


def settings_missing() -> UserError:
    """The error for a checkpoint that is to be loaded by itself."""
    return UserError(
        "a checkpoint of `LitBilevel` holds no settings and no frozen parameters, so it cannot be loaded by itself;"
        " load `policy/` of the run folder with `from_pretrained`, or build the module and give the checkpoint to"
        " `trainer.test(model, data, ckpt_path=…)`, `validate`, `predict` or `fit`."
    )


def misfit(expected: Mapping[str, Any], given: Mapping[str, Any]) -> UserError:
    """The error for a checkpoint whose entries (names to shapes) are not those of the model."""
    different = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    first = different[0]
    return UserError(
        f"the checkpoint does not fit the model: {len(different)} entries differ, the first is `{first}`"
        f" (checkpoint: {given.get(first)}, model: {expected.get(first)}); use the settings and the data it was written"
        " with (its `config.yaml`)."
    )
