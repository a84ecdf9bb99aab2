"""Validates the settings of the data module before any file is read.

Left out: what can only be told from the files; `prepare` and the module say that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_bilevel.errors import gather

if TYPE_CHECKING:
    from lit_bilevel.data.module import BilevelDataModule


def check_settings(data: BilevelDataModule) -> None:
    """Refuse settings of a `BilevelDataModule` that have no meaning, all in one message.

    Raises:
        UserError: naming each of them.
    """
    names = ("batch_size", "upper_batch_size", "eval_batch_size", "max_length", "num_proc", "num_workers")
    problems = [
        f"`data.{name}` is {getattr(data, name)}; it must be at least {int(name != 'num_workers')}"
        for name in names
        if getattr(data, name) < (name != "num_workers")
    ]
    known = {"truncation": ("right", "left"), "train_on": ("last", "all"), "on_bad_row": ("error", "skip")}
    given = data.encoding | {"on_bad_row": data.on_bad_row}
    problems += [
        f"`data.{name}` is {given[name]!r}; it must be {' or '.join(values)}"
        for name, values in known.items()
        if given[name] not in values
    ]
    if not 0 < data.monitor_fraction < 1:
        problems.append(f"`data.monitor_fraction` is {data.monitor_fraction}; it must lie between 0 and 1")
    if problems:
        raise gather("bad settings", problems)
