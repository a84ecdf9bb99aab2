"""Reads a pool as it lies on disk, to copy rows unchanged: lines of a jsonl file, records of others, or a table.

Ids are read as training reads them (`data/rows.py`): the `id` of a record, else its number, blank lines not counted;
a record that cannot be read has a number and no id. Left out: everything that training does to a row.
"""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_bilevel.data.files import dataset, is_file, members, records
from lit_bilevel.errors import UserError
from lit_bilevel.resources import locate

if TYPE_CHECKING:
    import pyarrow

Added = tuple[str, np.ndarray] | None


class Pool(ABC):
    """The records of a pool, in order; `ids` has `None` where one cannot be read, `has_ids` says that any was given.

    Args:
        keys: what every record holds in the column of ids.
        readable: which records are rows at all.
    """

    def __init__(self, keys: list[Any], readable: list[bool]):
        pairs = zip(keys, readable, strict=True)
        self.ids = [(str(i) if key is None else str(key)) if good else None for i, (key, good) in enumerate(pairs)]
        self.has_ids = any(key is not None for key in keys)

    @abstractmethod
    def columns(self) -> set[str]:
        """Names of all fields."""

    @abstractmethod
    def write(self, path: Path, mask: np.ndarray, added: Added, suffix: str) -> None:
        """Write the chosen records.

        Args:
            path: the file.
            mask: which records.
            added: name of a column that is added, and its values for the chosen records.
            suffix: ".jsonl", ".csv" or ".parquet".
        """

    @abstractmethod
    def as_lines(self) -> list[bytes]:
        """Every record as a line of JSON; of one that cannot be read, what stood there."""


class Lines(Pool):
    """Records that were read from JSON; a line is kept as the bytes it had."""

    def __init__(self, lines: list[bytes], id_column: str):
        self.lines = lines
        records = [_parse(line) for line in lines]
        self._columns = {name for record in records if record is not None for name in record}
        keys = [None if record is None else record.get(id_column) for record in records]
        super().__init__(keys, [record is not None for record in records])

    def columns(self) -> set[str]:
        return self._columns

    def write(self, path: Path, mask: np.ndarray, added: Added, suffix: str) -> None:
        lines = [self.lines[i] for i in mask.nonzero()[0]]
        if suffix == ".parquet":
            _write_parquet(path, _table([json.loads(line) for line in lines]), added)
            return
        if suffix == ".csv":
            _write_csv(path, [json.loads(line) for line in lines], added)
            return
        if added is not None:
            name = json.dumps(added[0]).encode()
            lines = [
                b"%s, %s: %s}" % (line[:-1].rstrip(), name, repr(float(value)).encode())
                for line, value in zip(lines, added[1], strict=True)
            ]
        path.write_bytes(b"".join(line + b"\n" for line in lines))

    def as_lines(self) -> list[bytes]:
        return self.lines


class Table(Pool):
    """Records of a parquet file or a dataset, with their schema."""

    def __init__(self, table: pyarrow.Table, id_column: str):
        self.table = table
        known = id_column in table.column_names
        keys = table[id_column].to_pylist() if known else [None] * len(table)
        super().__init__(keys, [True] * len(table))

    def columns(self) -> set[str]:
        return set(self.table.column_names)

    def write(self, path: Path, mask: np.ndarray, added: Added, suffix: str) -> None:
        import pyarrow

        table = self.table.filter(pyarrow.array(mask))
        if suffix == ".parquet":
            _write_parquet(path, table, added)
            return
        if suffix == ".csv":
            _write_csv(path, table.to_pylist(), added)
            return
        if added is not None:
            table = table.append_column(added[0], pyarrow.array(added[1]))
        with path.open("wb") as file:
            for batch in table.to_batches(max_chunksize=4096):
                file.writelines(_line(record) + b"\n" for record in batch.to_pylist())

    def as_lines(self) -> list[bytes]:
        return [_line(record) for record in self.table.to_pylist()]


def read_pool(paths: Sequence[str], id_column: str = "id") -> Pool:
    """The records of files, folders or hub ids, one after the other, as `data/files.py` knows them.

    Raises:
        UserError: if one cannot be read, or tables do not fit together.
    """
    import pyarrow

    pools = [_read(file, id_column) for path in paths for file in members(locate(path))]
    if len(pools) == 1:
        return pools[0]
    tables = [pool.table for pool in pools if isinstance(pool, Table)]
    if len(tables) < len(pools):
        return Lines([line for pool in pools for line in pool.as_lines()], id_column)
    try:
        return Table(pyarrow.concat_tables(tables, promote_options="default"), id_column)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"the columns of {', '.join(paths)} do not fit together ({error}); select from each."
        ) from error


def _read(path: str, id_column: str) -> Pool:
    file = Path(path)
    if not is_file(path):
        pool: Pool = Table(dataset(path).with_format("arrow")[:], id_column)
    elif file.suffix.lower() == ".parquet":
        pool = Table(_parquet_table(file), id_column)
    elif file.suffix.lower() == ".json":
        pool = Lines(_json_lines(file), id_column)
    elif file.suffix.lower() == ".csv":
        pool = Lines([_line(item) if isinstance(item, dict) else b"" for _, item in records(path)], id_column)
    else:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        pool = Lines([line.strip() for line in lines if line.strip()], id_column)
    if not pool.ids:
        raise UserError(f"{path} is empty; give the pool that the weights were learned on.")
    return pool


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record else None


def _json_lines(path: Path) -> list[bytes]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig").strip() or "[]")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); for one record a line name it .jsonl.") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__}, not a list of records.")
    return [_line(record) for record in records]


def _parquet_table(path: Path) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({error}).") from error


def _table(records: list[dict[str, Any]]) -> pyarrow.Table:
    import pyarrow

    columns = dict.fromkeys(name for record in records for name in record)
    arrays = {}
    for name in columns:
        try:
            arrays[name] = pyarrow.array([record.get(name) for record in records])
        except pyarrow.ArrowException as error:
            raise UserError(
                f"the field {name!r} has no single type ({error}), which a parquet table needs; write .jsonl."
            ) from error
    return pyarrow.table(arrays)


def _write_parquet(path: Path, table: pyarrow.Table, added: Added) -> None:
    import pyarrow
    import pyarrow.parquet

    if added is not None:
        table = table.append_column(added[0], pyarrow.array(added[1]))
        metadata = table.schema.metadata or {}
        if b"huggingface" in metadata:  # `datasets` trusts the list of columns that it left there
            about = json.loads(metadata[b"huggingface"])
            about.get("info", {}).get("features", {})[added[0]] = {"dtype": "float64", "_type": "Value"}
            table = table.replace_schema_metadata({**metadata, b"huggingface": json.dumps(about).encode()})
    pyarrow.parquet.write_table(table, path)


def _write_csv(path: Path, records: list[dict[str, Any]], added: Added) -> None:
    if added is not None:
        records = [record | {added[0]: float(value)} for record, value in zip(records, added[1], strict=True)]
    for record in records:
        for name, value in record.items():
            if isinstance(value, list | dict):
                raise UserError(f"the field {name!r} holds a {type(value).__name__}, which csv lacks; write .jsonl.")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
        writer.writeheader()
        writer.writerows(records)


def _line(record: object) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, default=plain).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: only its escape can be written
        return json.dumps(record, default=plain).encode("utf-8")


def plain(value: object) -> str:
    """Values of a table that JSON lacks."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise UserError(f"a value of type {type(value).__name__} cannot be written as JSON; write .parquet.")
