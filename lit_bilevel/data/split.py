"""Keeping the three sets apart: the validation file split in two, and no prompt shared with the pool.

Left out: near-duplicates; only prompts that are equal after stripping white space are found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from lit_bilevel.data.table import column
from lit_bilevel.errors import UserError, gathered


def apart(
    sets: Mapping[str, Dataset], on_bad_row: str, monitor_fraction: float
) -> tuple[dict[str, Dataset], list[str]]:
    """The sets of a run from those of its files, and which rows were left out of the pool.

    Args:
        sets: the tables `pool`, `validation` and perhaps `test`.
        on_bad_row: whether pool rows that ask what another set asks are refused (`error`) or left out (`skip`).
        monitor_fraction: share of the validation rows that only chooses the checkpoint.

    Raises:
        UserError: as `shared_with_pool` and `split` do.
    """
    found = dict(sets)
    shared, messages = shared_with_pool(found, on_bad_row)
    if len(shared):
        found["pool"] = found["pool"].select(np.delete(np.arange(len(found["pool"])), shared))
    found["upper"], found["monitor"] = split(found.pop("validation"), monitor_fraction)
    return found, messages


def split(table: Dataset, monitor_fraction: float) -> tuple[Dataset, Dataset]:
    """Upper and monitor parts, by hash of the id so that the order of the file does not matter.

    Raises:
        UserError: if either part would be empty.
    """
    count = round(len(table) * monitor_fraction)
    if count < 1 or len(table) - count < 1:
        raise UserError(
            f"the validation file has {len(table)} usable rows, too few to split into an upper and a monitor part at"
            f" `data.monitor_fraction` {monitor_fraction}; add rows or change the fraction."
        )
    hashes = [hashlib.sha256(id.encode()).digest() for id in column(table, "id").to_pylist()]
    ranked = sorted(range(len(table)), key=hashes.__getitem__)
    return table.select(sorted(ranked[count:])), table.select(sorted(ranked[:count]))


def shared_with_pool(sets: Mapping[str, Dataset], on_bad_row: str) -> tuple[np.ndarray, list[str]]:
    """Positions of the pool rows that ask what a row of validation or test asks, and who they are.

    Raises:
        UserError: naming the rows, where such rows are refused or no other row of the pool would be left.
    """
    import pyarrow
    import pyarrow.compute

    asked = {name: column(sets[name], "question").to_pylist() for name in ("validation", "test") if name in sets}
    known = pyarrow.array({digest for own in asked.values() for digest in own}, pyarrow.binary())
    questions = column(sets["pool"], "question")
    positions = pyarrow.compute.is_in(questions, value_set=known).to_numpy().nonzero()[0]
    twins: dict[bytes, list[int]] = {}
    for position, digest in zip(positions.tolist(), questions.take(positions).to_pylist(), strict=True):
        twins.setdefault(digest, []).append(position)
    names = {name: table.select_columns(["id", "place"]) for name, table in sets.items()}
    messages: dict[int, str] = {}
    for name, own in asked.items():
        for i, digest in enumerate(own):
            for position in twins.get(digest, ()):
                row, twin = names[name][i], names["pool"][position]
                who = f"{name} id {row['id']!r} has the prompt of pool id {twin['id']!r}"
                messages[position] = f"{who} ({row['place']}; {twin['place']})"
    if messages and (on_bad_row == "error" or len(messages) == len(sets["pool"])):
        raise gathered(
            "validation and test must share no prompt with the pool (the weights would be learned or scored on what"
            " they select; remove these rows from one of the files, or leave them out of the pool with"
            " `data.on_bad_row: skip`)",
            list(messages.values()),
        )
    return positions, list(messages.values())
