"""Keeping the three sets apart: the validation file split in two, and no prompt shared with the pool.

Left out: near-duplicates; only prompts that are equal after stripping white space are refused.
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


def refuse_overlap(rows: dict[str, list[Row]]) -> None:
    """Refuse validation and test rows whose prompt is in the pool.

    Raises:
        UserError: naming the rows.
    """
    pool = {row.prompt.strip(): row for row in rows["pool"]}
    problems = [
        f"{name} id {row.id!r} has the prompt of pool id {pool[row.prompt.strip()].id!r}"
        for name in ("validation", "test")
        for row in rows.get(name, ())
        if row.prompt.strip() in pool
    ]
    if problems:
        raise gathered(
            "validation and test must share no prompt with the pool (the weights would be learned or scored on what"
            " they select; remove these rows from one of the files)",
            problems,
        )
