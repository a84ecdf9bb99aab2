"""Makes the sets of a run from its files: pool, upper, monitor and perhaps test.

Left out: keeping them between runs; `prepare` does that file by file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from datasets import Dataset

from lit_bilevel.data.prepare import Preparation
from lit_bilevel.data.rows import Source
from lit_bilevel.data.split import apart
from lit_bilevel.errors import UserError


class Sets(NamedTuple):
    """The tables by name, what is wrong with the rows left out of each file, and the format of each file."""

    tables: dict[str, Dataset]
    skipped: dict[str, list[str]]
    formats: dict[str, str]


def read_sets(
    files: Mapping[str, Any],
    preparation: Preparation,
    settings: Mapping[str, Any],
    pair_levels: Collection[str],
    monitor_fraction: float,
) -> Sets:
    """Read the files.

    Args:
        files: of `pool`, `validation` and `test`; `None` where there is none.
        preparation: makes the table of a file.
        settings: how files are read, arguments of `Source`.
        pair_levels: the levels whose objective learns from pairs.
        monitor_fraction: share of the validation rows that is not trained on and chooses the checkpoint.

    Raises:
        UserError: for files, records, overlaps or sizes that cannot be used.
    """
    tables: dict[str, Dataset] = {}
    skipped: dict[str, list[str]] = {}
    formats: dict[str, str] = {}
    renamed: set[str] = set()
    for name, path in files.items():
        if path is not None:
            source = Source(path, **settings, pairs=_pairs_in(name, pair_levels))
            tables[name], skipped[name], own_formats, known = preparation(name, source)
            formats |= own_formats
            renamed |= {*known}
    if unknown := sorted(set(settings["columns"]) - renamed):  # one file has a field that another need not have
        raise UserError(
            f"`data.columns` renames {', '.join(map(repr, unknown))}, and no record of any file has such a field; mend"
            " the name, or leave it out."
        )
    tables, left_out = apart(tables, preparation.on_bad_row, monitor_fraction)
    for name, messages in left_out.items():
        skipped[name] += messages
    return Sets(tables, skipped, formats)


def _pairs_in(file: str, pair_levels: Collection[str]) -> Literal["ignored", "kept", "required"]:
    """What becomes of the preference pairs of a file; in the test file there may be any rows."""
    level = {"pool": "lower", "validation": "upper"}.get(file)
    if level is None:
        return "kept" if pair_levels else "ignored"
    return "required" if level in pair_levels else "ignored"
