"""Reads files as records, one at a time: json, jsonl, csv, parquet, a folder or a hub id.

A folder of data files is the list of its files: `data/` with `b.csv`, `sub/a.jsonl` and `README.md` is read as
`data/b.csv` and then `data/sub/a.jsonl`, each as it would be alone. A copy of a dataset on the hub, whose `README.md`
says which files are which split, is read by `datasets`, as are `folder::split` and the hub itself.

Each reader yields pairs of a place ("line 3") and a record, or the exception that reading it gave; a file that cannot
be read at all raises. Files are closed early and lines are never longer in memory than `MAX_LINE`, except in .json,
which is one value. Left out: streaming from the hub and compressed files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lit_bilevel.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SAVED = ("state.json", "dataset_dict.json")
"""What tells a folder that `datasets` saved."""
METADATA = ("dataset_info.json", "dataset_infos.json")
UNREAD = (".ndjson", ".tsv", ".arrow", ".feather", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
"""Ends of the names of data files that are not read; in a folder they are refused, for rows would be missed."""
MAX_LINE = 1 << 26

Records = Iterator[tuple[str, Any]]


def records(source: str) -> Records:
    """The records of a file, of a folder, or of a dataset on the hub.

    Args:
        source: a file; a folder that `datasets` saved; or a hub id as `name`, `name:config` or `name:config:split`
            (`name::split` has no config; the split is `train` if none is named); `folder::split` is a folder that
            `datasets` parts into splits by the names of its files.

    Raises:
        UserError: if there is no such file, or it cannot be read at all.
    """
    path = Path(source)
    if not is_file(source):
        return _number(dataset(source).with_format("arrow").iter(batch_size=1024))
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    suffix = path.suffix.lower()
    if suffix != ".parquet":
        _refuse_binary(path)
    return readers[suffix](path)


def members(source: str) -> list[str]:
    """The data files of a folder, also those of folders in it, in the order of their names; any other source itself.

    Raises:
        UserError: if a folder has no data file, or one of a kind that is not read.
    """
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).is_file() for name in SAVED):
        return [source]
    if _is_repository(folder):
        _tell(f"{folder}: its README.md says which files are what; the split `train` is read (`{folder}::test`)")
        return [source]
    inside = (path for path in folder.rglob("*") if path.is_file())
    visible = sorted(path for path in inside if not any(p[0] in "._" for p in path.relative_to(folder).parts))
    files = [path for path in visible if path.suffix.lower() in SUFFIXES and path.name not in METADATA]
    if unread := [path for path in visible if path.suffix.lower() in UNREAD]:
        raise UserError(
            f"{unread[0]} holds data of a kind that is not read; unpack or export it as one of {', '.join(SUFFIXES)},"
            f" or move it out of {folder}."
        )
    if not files:
        raise UserError(
            f"{folder} could not be loaded as a folder of data files: there is none of {', '.join(SUFFIXES)} in it."
        )
    rest = [path.relative_to(folder).as_posix() for path in visible if path not in files]
    left = f" (left alone: {', '.join(rest)})" if rest else ""
    names = ", ".join(path.relative_to(folder).as_posix() for path in files)
    _tell(f"{folder}: {len(files)} data file{'' if len(files) == 1 else 's'}, {names}{left}")
    return [str(path) for path in files]


def _tell(text: str) -> None:
    from lightning.pytorch.utilities import rank_zero_info  # seconds to import, which `select` need not wait for

    rank_zero_info(text)


def _is_repository(folder: Path) -> bool:
    """Whether a folder is a copy of a dataset on the hub, with a card that names the files of its splits."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.startswith("---") and "\nconfigs:" in text.partition("\n---")[0]


def list_files(source: str) -> list[Path]:
    """The files on disk that hold a source's records.

    Raises:
        UserError: as `records` does.
    """
    if is_file(source):
        return [Path(source)]
    return [Path(file["filename"]) for file in dataset(source).cache_files]


def is_file(source: str) -> bool:
    """Whether a source is a file, and not a folder or a hub id.

    Raises:
        UserError: if it is neither: a name with the suffix of a file and no file, or a file of another kind.
    """
    path = Path(source)
    known = path.suffix.lower() in SUFFIXES
    if path.is_dir():
        return False
    if known and not path.is_file():
        raise UserError(f"{source} does not exist; check the path (it is read from {Path.cwd()}).")
    if not known and path.exists():
        raise UserError(f"{source} is not a known kind of file; use {', '.join(SUFFIXES)}, a folder or a hub id.")
    return known


def _refuse_binary(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; convert it to UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    if b"\0" in head or head[:2] == b"\x1f\x8b":
        raise UserError(f"{path} is a binary file, not text; unpack or export it as one of {', '.join(SUFFIXES)}.")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without a byte order mark; `None` for a line that is too long to read."""
    head = file.read(1 << 16)
    file.seek(0)
    if b"\r" in head and b"\n" not in head:  # as old spreadsheets end their lines
        yield from _by_returns(file)
        return
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        whole = len(line) <= MAX_LINE
        end = line
        while not whole and end and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE)
        yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line) if whole else None


def _by_returns(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    number, rest = 0, b""
    while chunk := file.read(1 << 16):
        *lines, rest = (rest + chunk).removeprefix(b"" if number else b"\xef\xbb\xbf").split(b"\r")
        for line in lines:
            number += 1
            yield number, line + b"\r" if len(line) < MAX_LINE else None
    if rest:
        yield number + 1, rest if len(rest) <= MAX_LINE else None


def _jsonl_records(path: Path) -> Records:
    with path.open("rb") as file:
        for number, line in _lines(file):
            if line is None:
                yield f"line {number}", ValueError(f"longer than {MAX_LINE} bytes")
            elif line.strip():
                yield f"line {number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON ({error})")
    return _object(record)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object none of whose keys stands twice; of two values, JSON readers drop one unsaid."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return record


def _object(record: Any) -> Any:
    return record if isinstance(record, dict) else ValueError(f"a {type(record).__name__}, not an object")


def _json_records(path: Path) -> Records:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig").strip() or "[]", object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); for one record a line name it .jsonl.") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__}, not a list of records.")
    for number, record in enumerate(content, start=1):
        yield f"record {number}", _object(record)


def _csv_records(path: Path) -> Records:
    csv.field_size_limit(MAX_LINE)  # its own limit, 128 KiB, is too small for texts

    def texts() -> Iterator[str]:
        for number, line in _lines(file):
            if line is None:
                raise UserError(f"{path}, line {number}: longer than {MAX_LINE} bytes; mend the line.")
            yield line.decode("utf-8", "surrogateescape")  # surrogates are refused where the text is read

    with path.open("rb") as file:
        reader = csv.reader(texts(), strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {start}", ValueError(f"not valid CSV ({error})")
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise UserError(f"{path} has a column name twice in its first line: {', '.join(header)}.")
            elif len(fields) == len(header):
                yield f"line {start}", dict(zip(header, fields, strict=True))
            elif fields:
                yield f"line {start}", ValueError(f"{len(fields)} fields where the first line names {len(header)}")


def _parquet_records(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _number(file.iter_batches(batch_size=1024))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}).") from error


def dataset(source: str) -> Dataset:
    """The dataset in a folder or on the hub, as `datasets` reads it.

    Raises:
        UserError: if it cannot, or the folder holds several splits.
    """
    import datasets

    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise UserError(f"{path} holds several splits; name one of them: {', '.join(str(path / s) for s in splits)}.")
    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        builder = datasets.load_dataset_builder(name, config or None)
        # pandas would take the cells None, NA and null for missing ones
        as_it_is = {"keep_default_na": False} if hasattr(builder.config, "keep_default_na") else {}
        return datasets.load_dataset(name, config or None, split=split or "train", **as_it_is)
    except Exception as error:  # the network, the hub, or whatever the library finds wrong with the files
        what = "a folder of data files" if path.is_dir() else "neither a local file nor a dataset on the hub"
        raise UserError(
            f"{source!r} could not be loaded as {'' if path.is_dir() else 'it is '}{what} ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''}); check the path or the id (`name:config:split`"
            " chooses a config and a split)."
        ) from error


def _number(batches: Iterable[pyarrow.RecordBatch]) -> Records:
    number = 0
    for batch in batches:
        for record in _pylist(batch):
            number += 1
            yield f"row {number}", record


def _pylist(batch: pyarrow.RecordBatch) -> list[Any]:
    """The records of an Arrow batch; one that cannot become Python values is an exception."""
    try:
        return batch.to_pylist()
    except ValueError as error:
        if len(batch) == 1:
            return [ValueError("not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error))]
        return [record for row in range(len(batch)) for record in _pylist(batch.slice(row, 1))]
