"""Writes parts of a data set as new files: records unchanged, chosen by their position.

Records are never rebuilt from rows, so earlier turns, system prompts and every other field stay. A record without an id
gets the one it has in the original. Left out: keeping bytes and schemas as `lit-bilevel select` does; only the next run
reads these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lit_bilevel.commands.originals import plain
from lit_bilevel.commands.select import apportion
from lit_bilevel.data.files import members, records
from lit_bilevel.errors import UserError
from lit_bilevel.files import replacing
from lit_bilevel.resources import locate

Stratum = TypeVar("Stratum", str, tuple[str, str])


def copy_records(
    path: str | Sequence[str], columns: Mapping[str, str], chosen: Mapping[int, str], folder: Path
) -> str | list[str]:
    """Write the chosen records of a set.

    Args:
        path: the set's file, hub id or list of these.
        columns: renames of columns, theirs to ours.
        chosen: id by position, counted over all files.
        folder: of the new files; each has the name of its original.

    Returns:
        The new file, or a list of files where `path` was one, or a folder of several.
    """
    given = [path] if isinstance(path, str) else list(path)
    paths = [file for one in given for file in members(locate(one))]
    written, position = [], 0
    for number, original in enumerate(paths):
        own_folder = folder / str(number) if len(paths) > 1 else folder
        target = own_folder / f"{Path(original).stem}.jsonl"
        lines = 0
        with replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
            for _, record in records(original):
                if position in chosen:
                    file.write(_line(record, columns, chosen[position]))
                    lines += 1
                position += 1
        if lines:
            written.append(str(target))
    return written[0] if isinstance(path, str) and len(paths) == 1 else written


def _line(record: dict[str, Any], columns: Mapping[str, str], key: str) -> str:
    if not any(columns.get(name, name) == "id" and record[name] is not None for name in record):
        record = {**record, "id": key}
    return json.dumps(record, ensure_ascii=False, default=plain) + "\n"


def stratify(strata: Sequence[Stratum], count: int, seed: int, what: str = "`--subset`") -> np.ndarray:
    """[count] positions in order, from every stratum its share of the whole, drawn without replacement.

    Args:
        strata: what each row belongs to.
        count: how many rows, at most all.
        seed: of the draw.
        what: the setting that asks for them, for the message.

    Raises:
        UserError: if there are fewer rows.
    """
    if not 0 < count <= len(strata):
        raise UserError(f"{what} is {count:,} and there are {len(strata):,} usable rows; ask for fewer.")
    numbers = {name: i for i, name in enumerate(sorted(set(strata)))}
    group = np.array([numbers[name] for name in strata])
    rows = np.bincount(group)
    wanted = apportion(count, rows, rows)
    order = np.lexsort((np.random.default_rng(seed).random(len(group)), group))
    first = np.concatenate([[0], rows.cumsum()[:-1]])
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - first[group[order]]
    return (rank < wanted[group]).nonzero()[0]
