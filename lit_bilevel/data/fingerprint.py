"""Sums up the data of a run in a few strings: ids, texts and learned token ids of each set, and their order.

Neither where the files lie nor when they are read is part of it. Example: a chat template that writes today's date into
the prompt gives other token ids tomorrow, and the run goes on.

A checkpoint carries it, so that a run is not continued on changed data by accident: weights belong to rows.
Left out: the test set, which may change, and settings that change nothing, such as the number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from lit_bilevel.data.table import column
from lit_bilevel.errors import UserError, gather

NAMES = {"pool": "pool", "upper": "validation", "monitor": "validation"}


def fingerprint(
    sets: Mapping[str, Dataset], order: Mapping[str, int], identity: Callable[[bool], Mapping[str, Any]]
) -> dict[str, Any]:
    """Of the sets that training reads, and of the settings that define which rows meet in a step.

    Args:
        sets: the tables.
        order: names of settings and their values.
        identity: what token ids depend on beside the rows, if any row was truncated and if none was.
    """
    import pyarrow.compute

    truncated = any(pyarrow.compute.any(column(sets[name], "truncated")).as_py() for name in NAMES)
    return {
        "sets": {name: {"rows": len(sets[name]), "hash": rows_digest(sets[name])} for name in NAMES},
        "order": {**order, **identity(truncated)},
    }


def rows_digest(dataset: Dataset) -> str:
    """Digest of the ids, texts and learned token ids of all rows, in their order."""
    digest = hashlib.sha256()
    for chunk in column(dataset, "digest").chunks:
        digest.update(b"".join(chunk.to_pylist()))
    return digest.hexdigest()


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], paths: Mapping[str, Any]) -> None:
    """Refuse to continue on other data.

    Args:
        before: the checkpoint's fingerprint.
        now: that of the data at hand.
        paths: of the files.

    Raises:
        UserError: naming each file and setting that changed.
    """
    problems = []
    changed = {NAMES[name]: name for name in reversed(NAMES) if before["sets"][name] != now["sets"][name]}
    for file, name in changed.items():
        rows = [fingerprint["sets"][name]["rows"] for fingerprint in (before, now)]
        what = f"{rows[1]} rows instead of {rows[0]}" if rows[0] != rows[1] else "other ids, texts or tokens"
        problems.append(f"`data.{file}` ({paths.get(file)}) is not what the checkpoint was trained on: {what}")
    for name in dict.fromkeys([*before["order"], *now["order"]]):
        value, then = now["order"].get(name), before["order"].get(name)
        if value != then:
            problems.append(f"{name} is {value} and was {then}")
    if problems:
        error = gather("the run cannot be continued with these data", problems)
        raise UserError(f"{error}; restore them, or start a new run (`WarmStart` takes over weights by id).")
