"""Files to rows: json, jsonl, parquet or a hub id, checked record by record.

A row's `row` is its position in the source and never changes; `id` is the user's own where there is one. All bad
records are gathered, then named with file and line in one error, or skipped and counted where that was asked for.

Left out: streaming sources. Data weights need stable positions and a known number of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_bilevel.data.formats import FORMATS, Format, detect
from lit_bilevel.errors import UserError, gathered
from lit_bilevel.types import Row

SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass
class Source:
    """Where rows come from and how to read them.

    Args:
        path: a json, jsonl or parquet file, or the id of a dataset on the hub.
        format: `auto` to detect from the columns, or a format's name.
        columns: renames, from the file's column name to ours.
        on_bad_row: `error` stops at bad records and names them; `skip` leaves them out and counts them.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    skipped: list[str] = field(default_factory=list, init=False)

    def read(self) -> list[Row]:
        """All good rows, in the order of the source.

        Raises:
            UserError: if the file is missing, empty or unreadable, or has bad records and `on_bad_row` is `error`.
        """
        rows: list[Row] = []
        problems: list[str] = []
        seen: dict[str, int] = {}
        reader: Format | None = None
        count = 0
        for count, (place, record) in enumerate(self._records(), start=1):
            try:
                if isinstance(record, Exception):
                    raise ValueError(str(record))
                reader = reader or self._reader(place, record)
                row = self._row(count - 1, record, reader)
                if row.id in seen:
                    raise ValueError(f"the id {row.id!r} was already used on row {seen[row.id]}")
                seen[row.id] = count
                rows.append(row)
            except UserError:
                raise
            except ValueError as error:
                problems.append(f"{place}: {error}")
        if problems and self.on_bad_row == "error":
            raise gathered(f"bad data in {self.path} (mend it, or leave it out with `data.on_bad_row: skip`)", problems)
        self.skipped = problems
        if not rows:
            state = "is empty" if count == 0 else f"has no usable record among {count} (the first: {problems[0]})"
            raise UserError(f"{self.path} {state}; give a file with at least one record per line.")
        return rows

    def _reader(self, place: str, record: Mapping[str, Any]) -> Format:
        names = {known.name: known for known in FORMATS}
        if self.format != "auto":
            if self.format not in names:
                raise UserError(f"`data.format` is {self.format!r}; the known formats are: auto, {', '.join(names)}.")
            return names[self.format]
        columns = {self.columns.get(name, name) for name in record}
        found = detect(columns)
        if found is None:
            wanted = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS)
            raise UserError(
                f"{self.path}, {place}: the columns {sorted(columns)} fit no known format ({wanted}); rename them with"
                " `data.columns`."
            )
        return found

    def _row(self, position: int, record: Mapping[str, Any], reader: Format) -> Row:
        record = {self.columns.get(name, name): value for name, value in record.items()}
        prompt, response = reader.read(record)
        key = record.get("id")
        source = record.get("source")
        return Row(
            row=position,
            id=str(position) if key is None else str(key),
            prompt=prompt,
            response=response,
            source="" if source is None else str(source),
        )

    def _records(self) -> Iterator[tuple[str, Any]]:
        """Pairs of a place ("line 3") and a record, or the exception that reading it gave."""
        path = Path(self.path)
        if path.suffix not in SUFFIXES:
            if path.exists():
                raise UserError(f"{self.path} is not a known kind of file; use {', '.join(SUFFIXES)} or a hub id.")
            yield from self._hub_records()
            return
        if not path.is_file():
            raise UserError(f"{self.path} does not exist; check the path (it is read from {Path.cwd()}).")
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
        elif path.suffix == ".json":
            yield from _json_records(path)
        else:
            yield from _jsonl_records(path)

    def _hub_records(self) -> Iterator[tuple[str, Any]]:
        from datasets import load_dataset

        try:
            dataset = load_dataset(self.path, split="train")
        except Exception as error:
            raise UserError(
                f"{self.path!r} is neither a local file nor a dataset that could be loaded from the hub"
                f" ({type(error).__name__}: {str(error).splitlines()[0]}); check the path or the id."
            ) from error
        for number, record in enumerate(dataset, start=1):
            yield f"row {number}", record


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield f"line {number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} of the line)")
    except (json.JSONDecodeError, RecursionError) as error:
        return ValueError(f"not valid JSON ({error})")
    return record if isinstance(record, dict) else ValueError(f"a {type(record).__name__}, not an object")


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8") or "[]")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); for one record a line name it .jsonl.") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__}, not a list of records.")
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record if isinstance(record, dict) else ValueError("not an object")


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({error}).") from error
