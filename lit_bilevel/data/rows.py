"""Files to rows, checked record by record.

A row's `row` is its position in the source and never changes; `id` is the user's own where there is one. All bad
records are gathered, then named with file and line in one error, or skipped and counted where that was asked for.

Left out: streaming sources. Data weights need stable positions and a known number of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_bilevel.data.files import records
from lit_bilevel.data.formats import FORMATS, Format, detect
from lit_bilevel.errors import UserError, gathered
from lit_bilevel.types import Row

PATIENCE = 100
"""Records of an unknown format after which a file is given up."""


@dataclass
class Source:
    """Where rows come from and how to read them.

    Args:
        path: a json, jsonl, csv or parquet file, an Arrow folder, or a dataset on the hub (`name:config:split`); or
            several of these, one after the other: rows without a `source` then have the file's name.
        format: `auto` to detect from the columns, or a format's name.
        columns: renames, from the file's column name to ours.
        on_bad_row: `error` stops at bad records and names them; `skip` leaves them out and counts them.
    """

    path: str | Sequence[str]
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    skipped: list[str] = field(default_factory=list, init=False)
    formats: dict[str, str] = field(default_factory=dict, init=False)
    """The format of each file."""

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def name(self) -> str:
        """The files, for messages."""
        return ", ".join(self.paths)

    def read(self) -> list[Row]:
        """All good rows, in the order of the source.

        Raises:
            UserError: if a file is missing, empty or unreadable, or has bad records and `on_bad_row` is `error`.
        """
        rows: list[Row] = []
        self.skipped, self.formats = [], {}
        ids: dict[str, str] = {}
        contents: dict[bytes, str] = {}
        count = 0
        for path in self.paths:
            before = count
            for count, (place, item) in enumerate(self._read_file(path), start=before + 1):
                try:
                    row = self._row(count - 1, place, item, path)
                    _refuse_repeated(row.id, ids, place, f"the id {row.id!r} was already used on")
                    _refuse_repeated(_digest(row), contents, place, "the same prompt and response as on")
                    rows.append(row)
                except ValueError as error:
                    self.skipped.append(f"{place}: {error}")
            if count == before:
                raise UserError(f"{path} is empty; give a file with at least one record per line.")
        if self.skipped and self.on_bad_row == "error":
            raise gathered(
                f"bad data in {self.name} (mend it, or leave it out with `data.on_bad_row: skip`)", self.skipped
            )
        if not rows:
            raise UserError(f"{self.name} has no usable record among {count} (the first: {self.skipped[0]}).")
        return rows

    def _read_file(self, path: str) -> Iterator[tuple[str, tuple[Format, dict[str, Any]] | Exception]]:
        """Place ("pool.jsonl, line 3") and renamed record with its format, or the exception that reading it gave."""
        reader = self._forced()
        strangers: list[tuple[str, dict[str, Any]]] = []
        for where, record in records(path):
            place = f"{path}, {where}"
            if isinstance(record, Exception):
                yield place, record
                continue
            renamed = {self.columns.get(name, name): value for name, value in record.items()}
            if len(renamed) < len(record):
                raise UserError(f"{place}: `data.columns` gives two columns the same name; rename only one of them.")
            reader = reader or detect(renamed)
            if reader is None:
                strangers.append((place, renamed))
                if len(strangers) == PATIENCE:
                    break
                yield place, ValueError(f"the columns {_names(renamed)} fit no known format")
                continue
            if reader.refusal:
                raise UserError(f"{place}: {reader.refusal}.")
            self.formats[path] = reader.name
            yield place, (reader, renamed)
        if reader is None and strangers:
            wanted = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS if not known.refusal)
            place, renamed = strangers[0]
            raise UserError(
                f"{place}: the columns {_names(renamed)} fit no known format ({wanted}); rename them with"
                " `data.columns`."
            )

    def _forced(self) -> Format | None:
        names = {known.name: known for known in FORMATS}
        if self.format == "auto":
            return None
        if self.format not in names:
            raise UserError(f"`data.format` is {self.format!r}; the known formats are: auto, {', '.join(names)}.")
        return names[self.format]

    def _row(self, position: int, place: str, item: tuple[Format, dict[str, Any]] | Exception, path: str) -> Row:
        if isinstance(item, Exception):
            raise item
        reader, record = item
        turns = reader.read(record)
        source = _key(record, "source")
        if source is None:
            source = Path(path).stem if len(self.paths) > 1 else ""
        key = _key(record, "id")
        prompt = turns[-2][1] if len(turns) > 1 else ""
        return Row(
            row=position,
            id=str(position) if key is None else key,
            prompt=prompt,
            response=turns[-1][1],
            source=source,
            history=tuple(turns[:-2]),
            place=place,
        )


def _names(record: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, record))


def _key(record: Mapping[str, Any], name: str) -> str | None:
    """An optional string or whole number."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        if value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the field `{name}` is not UTF-8 text") from None
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the field `{name}` is {type(value).__name__}, not a string or a whole number")
    return str(value)


def _digest(row: Row) -> bytes:
    """A short name for what a row says."""
    text = json.dumps([row.history, row.prompt, row.response])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _refuse_repeated(key: Any, seen: dict[Any, str], place: str, what: str) -> None:
    if key in seen:
        raise ValueError(f"{what} {seen[key]}")
    seen[key] = place
