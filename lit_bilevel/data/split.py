"""Keeps the sets apart: no prompt in two of the three files, and the validation file split in two by prompts.

Left out: near-duplicates; only prompts that are equal after stripping white space are found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from lit_bilevel.data.table import column
from lit_bilevel.errors import UserError, gather

REASONS = {
    "pool": "validation and test must share no prompt with the pool (the weights would be learned or scored on what"
    " they select",
    "validation": "the test must share no prompt with validation (the policy would be tested on what it was chosen by",
}


def apart(
    sets: Mapping[str, Dataset], on_bad_row: str, monitor_fraction: float
) -> tuple[dict[str, Dataset], dict[str, list[str]]]:
    """The sets of a run from those of its files, and which rows were left out of the pool and of validation.

    Args:
        sets: the tables `pool`, `validation` and perhaps `test`.
        on_bad_row: whether rows that ask what a more trusted file asks are refused (`error`) or left out (`skip`).
        monitor_fraction: share of the validation rows that is not trained on and chooses the checkpoint.

    Raises:
        UserError: as `find_shared` and `split` do.
    """
    parts = dict(sets)
    left_out = {}
    for name, others in (("validation", ("test",)), ("pool", ("validation", "test"))):
        positions, left_out[name] = find_shared(parts, name, others, on_bad_row)
        if len(positions):
            parts[name] = parts[name].select(np.delete(np.arange(len(parts[name])), positions))
    parts["upper"], parts["monitor"] = split(parts.pop("validation"), monitor_fraction)
    return parts, left_out


def split(table: Dataset, monitor_fraction: float) -> tuple[Dataset, Dataset]:
    """Upper and monitor parts, by hash of the id so that the order of the file does not matter.

    Rows with the same prompt stay together, with the hash of their least id.

    Raises:
        UserError: if either part would be empty.
    """
    count = round(len(table) * monitor_fraction)
    ids = column(table, "id").to_pylist()
    groups: dict[bytes, list[int]] = {}
    for row, question in enumerate(column(table, "question").to_pylist()):
        groups.setdefault(question, []).append(row)
    ranked = sorted(groups.values(), key=lambda rows: hashlib.sha256(min(ids[row] for row in rows).encode()).digest())
    monitor: list[int] = []
    for rows in ranked:
        if len(monitor) + len(rows) <= count:
            monitor += rows
    if not monitor or len(monitor) == len(table):
        raise UserError(
            f"the validation file has {len(table)} usable rows, too few to split into an upper and a monitor part at"
            f" `data.monitor_fraction` {monitor_fraction}; add rows or change the fraction."
        )
    upper = sorted(set(range(len(table))) - set(monitor))
    return table.select(upper), table.select(sorted(monitor))


def find_shared(
    sets: Mapping[str, Dataset], name: str, others: Sequence[str], on_bad_row: str
) -> tuple[np.ndarray, list[str]]:
    """Positions of the rows of a set that ask what a row of other sets asks, and who they are.

    Raises:
        UserError: naming the rows, where such rows are refused or no other row of the set would be left.
    """
    import pyarrow
    import pyarrow.compute

    asked = {other: column(sets[other], "question").to_pylist() for other in others if other in sets}
    known = pyarrow.array({digest for own in asked.values() for digest in own}, pyarrow.binary())
    questions = column(sets[name], "question")
    positions = pyarrow.compute.is_in(questions, value_set=known).to_numpy().nonzero()[0]
    twins: dict[bytes, list[int]] = {}
    for position, digest in zip(positions.tolist(), questions.take(positions).to_pylist(), strict=True):
        twins.setdefault(digest, []).append(position)
    named = {key: table.select_columns(["id", "place"]) for key, table in sets.items()}
    messages: dict[int, str] = {}
    for other, own in asked.items():
        for i, digest in enumerate(own):
            for position in twins.get(digest, ()):
                row, twin = named[other][i], named[name][position]
                who = f"{other} id {row['id']!r} has the prompt of {name} id {twin['id']!r}"
                messages[position] = f"{who} ({row['place']}; {twin['place']})"
    if messages and (on_bad_row == "error" or len(messages) == len(sets[name])):
        raise gather(
            f"{REASONS[name]}; remove these rows from one of the files, or leave them out of the {name} with"
            " `data.on_bad_row: skip`)",
            list(messages.values()),
        )
    return positions, list(messages.values())
