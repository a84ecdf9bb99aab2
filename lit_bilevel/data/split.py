"""Keeping the three sets apart: the validation file split in two, and no prompt shared with the pool.

Left out: near-duplicates; only prompts that are equal after stripping white space are found.
"""

from __future__ import annotations

import hashlib

from lit_bilevel.errors import UserError, gathered
from lit_bilevel.types import Row


def split(rows: list[Row], monitor_fraction: float) -> tuple[list[Row], list[Row]]:
    """Upper and monitor parts, by hash of the id so that the order of the file does not matter.

    Raises:
        UserError: if either part would be empty.
    """
    count = round(len(rows) * monitor_fraction)
    if count < 1 or len(rows) - count < 1:
        raise UserError(
            f"the validation file has {len(rows)} usable rows, too few to split into an upper and a monitor part at"
            f" `data.monitor_fraction` {monitor_fraction}; add rows or change the fraction."
        )
    ranked = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    chosen = {row.id for row in ranked[:count]}
    return [row for row in rows if row.id not in chosen], [row for row in rows if row.id in chosen]


def part_from_pool(rows: dict[str, list[Row]], on_bad_row: str) -> list[str]:
    """Take the questions of validation and test out of the pool, and say which; under `error` refuse them.

    Raises:
        UserError: naming the rows, also where no row of the pool would be left.
    """
    pool: dict[tuple[str, ...], list[Row]] = {}
    for row in rows["pool"]:
        pool.setdefault(_question(row), []).append(row)
    shared = {
        twin.row: f"{name} id {row.id!r} has the prompt of pool id {twin.id!r} ({row.place}; {twin.place})"
        for name in ("validation", "test")
        for row in rows.get(name, ())
        for twin in pool.get(_question(row), ())
    }
    kept = [row for row in rows["pool"] if row.row not in shared]
    if shared and (on_bad_row == "error" or not kept):
        raise gathered(
            "validation and test must share no prompt with the pool (the weights would be learned or scored on what"
            " they select; remove these rows from one of the files, or leave them out of the pool with"
            " `data.on_bad_row: skip`)",
            list(shared.values()),
        )
    rows["pool"] = kept
    return list(shared.values())


def _question(row: Row) -> tuple[str, ...]:
    """What two rows may not share: the turns before the answer but system prompts, or all of a plain text."""
    return tuple(text.strip() for role, text in row.turns if role != "system") or (row.response.strip(),)
