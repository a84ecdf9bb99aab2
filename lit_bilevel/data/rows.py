"""Reads files as rows, one at a time, and checks every record.

A row's `row` is its position in the source and never changes; `id` is the user's own where there is one. A record that
cannot be read gives a `Problem` in its place, with file and line; `prepare` decides what comes of it.

Left out: streaming sources. Data weights need stable positions and a known number of rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_bilevel.data.fields import read_fields, unread_columns
from lit_bilevel.data.files import members, records
from lit_bilevel.data.formats import FORMATS, Format, Preference, Text, detect
from lit_bilevel.errors import UserError
from lit_bilevel.resources import locate
from lit_bilevel.types import Row

PATIENCE = 100
"""Records of an unknown format after which a file is given up."""


class Problem(NamedTuple):
    """A record that is no row: its position in the source, and what is wrong with it and where."""

    row: int
    message: str


@dataclass
class Source:
    """Where rows come from and how to read them.

    Args:
        path: a json, jsonl, csv or parquet file, a folder of them, an Arrow folder, or a dataset on the hub
            (`name:config:split`); or several of these, one after the other: rows without a `source` then have the
            file's name.
        format: `auto` to detect from the columns, or a format's name.
        columns: renames, from the file's column name to ours.
        pairs: whether the rejected answers of preference pairs are `ignored` or `kept`, or `required` of every record.
    """

    path: str | Sequence[str]
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    pairs: Literal["ignored", "kept", "required"] = "ignored"
    formats: dict[str, str] = field(default_factory=dict, init=False)
    """The format of each file that was read."""
    unread: set[str] = field(default_factory=set, init=False)
    """Names of fields that were read over: metadata, or so it is taken."""
    renamed: set[str] = field(default_factory=set, init=False)
    """Those of the names in `columns` that some record has."""

    @functools.cached_property
    def paths(self) -> list[str]:
        """The files, those of folders in the order of their names.

        Raises:
            UserError: if a folder holds none, or one that cannot be read.
        """
        return [file for path in self._given for file in members(path)]

    @property
    def _given(self) -> list[str]:
        return [locate(path) for path in ([self.path] if isinstance(self.path, str) else self.path)]

    @property
    def name(self) -> str:
        """The files, or their folders, for messages."""
        return ", ".join(self._given)

    def read(self) -> Iterator[Row | Problem]:
        """Every record in the order of the source, as a row or as a problem.

        Raises:
            UserError: if a file is missing, empty, unreadable, of no known format, or without pairs that it must have.
        """
        position = 0
        for path in self.paths:
            before = position
            for place, item in self._read_file(path):
                yield self._row_or_problem(position, place, item, path)
                position += 1
            if position == before:
                raise UserError(f"{path} is empty; give a file with at least one record per line.")

    def _read_file(self, path: str) -> Iterator[tuple[str, tuple[Format, dict[str, Any]] | Exception]]:
        """Place ("pool.jsonl, line 3") and renamed record with its format, or the exception that reading it gave."""
        reader = self._choose_format()
        strangers: list[tuple[str, dict[str, Any]]] = []
        for where, record in records(path):
            place = f"{path}, {where}"
            if isinstance(record, Exception):
                yield place, record
                continue
            self.renamed |= self.columns.keys() & record.keys()
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
            if self.pairs == "required" and not isinstance(reader, Preference):
                raise UserError(
                    f"{place}: the format is {reader.name}, but the objective of this level learns from preference"
                    " pairs; give a file with `chosen` and `rejected` (`data.columns` renames columns), or use the"
                    " objective `SFT`."
                )
            self.formats[path] = reader.name
            yield place, (reader, renamed)
        if reader is None and strangers:
            wanted = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS)
            place, renamed = strangers[0]
            raise UserError(
                f"{place}: the columns {_names(renamed)} fit no known format ({wanted}); rename them with"
                " `data.columns`, theirs to ours: `--data.columns '{question: prompt, answer: response}'`, for example."
            )

    def _choose_format(self) -> Format | None:
        names = {known.name: known for known in FORMATS}
        if self.format == "auto":
            return None
        if self.format not in names:
            raise UserError(f"`data.format` is {self.format!r}; the known formats are: auto, {', '.join(names)}.")
        return names[self.format]

    def _row_or_problem(
        self, position: int, place: str, item: tuple[Format, dict[str, Any]] | Exception, path: str
    ) -> Row | Problem:
        try:
            return self._row(position, place, item, path)
        except ValueError as error:
            return Problem(position, f"{place}: {error}")

    def _row(self, position: int, place: str, item: tuple[Format, dict[str, Any]] | Exception, path: str) -> Row:
        if isinstance(item, Exception):
            raise item
        reader, record = item
        turns, rejected = reader.read(record), None
        answers = not isinstance(reader, Preference | Text)
        details, unread = read_fields(record, turns, answers)
        self.unread |= unread | unread_columns(record, (*reader.required, *reader.optional))
        if self.pairs != "ignored" and isinstance(reader, Preference):
            *_, chosen, rejected = reader.pair(record)
            if chosen.strip() == rejected.strip():
                raise ValueError("the fields `chosen` and `rejected` hold the same answer")
        source = _key(record, "source")
        if source is None:
            source = Path(path).stem if len(self.paths) > 1 else ""
        key = _key(record, "id")
        prompt = turns[-2].content if len(turns) > 1 else ""
        return Row(
            row=position,
            id=str(position) if key is None else key,
            prompt=prompt,
            response=turns[-1].content or json.dumps(json.loads(details)["messages"][-1]["tool_calls"]),
            source=source,
            history=tuple((turn.role, turn.content) for turn in turns[:-2]),
            place=place,
            rejected=rejected,
            details=details,
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
