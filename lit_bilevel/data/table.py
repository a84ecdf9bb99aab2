"""Keeps rows on disk: an Arrow file of a source's rows, and one with their token ids, read through the memory map.

Neither is ever whole in memory. What has to be known of all rows at once is kept as digests of 16 bytes: of what a row
asks (`question`, no two sets may share one) and of what it is (`digest`, for telling whether data changed).
Left out: near-duplicates; rows are the same where their ids or all their words are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from datasets import Dataset, Features, List, Value

from lit_bilevel.data.encode import Encoded, Encoder
from lit_bilevel.data.pairs import encode_with_pairs
from lit_bilevel.data.rows import Problem, Source
from lit_bilevel.data.template import cut_after_learned
from lit_bilevel.types import Row

if TYPE_CHECKING:
    import pyarrow

Item = TypeVar("Item")

CHUNK = 1000
ROWS = Features(
    {
        "row": Value("int64"),
        "id": Value("string"),
        "prompt": Value("large_string"),
        "response": Value("large_string"),
        "source": Value("string"),
        "history": List(List(Value("string"))),
        "place": Value("string"),
        "rejected": Value("large_string"),
        "details": Value("large_string"),
    }
)
ENCODED = Features(
    {name: ROWS[name] for name in ("row", "id", "prompt", "response", "source", "place")}
    | {
        "input_ids": List(Value("int32")),
        "response_start": Value("int64"),
        "truncated": Value("bool"),
        "earlier": List(Value("int32")),
        "rejected_ids": List(Value("int32")),
        "pair": Value("bool"),
        "length": Value("int32"),
        "question": Value("binary"),
        "digest": Value("binary"),
        "problem": Value("string"),
        "notice": Value("string"),
    }
)


# ---- rows ----


def write_rows(
    source: Source, path: Path, counted: Callable[[int], object] = lambda rows: None
) -> tuple[Dataset, list[str]]:
    """Write the rows of a source to an Arrow file, those left out that repeat an earlier one's id or words.

    Args:
        source: where they come from.
        path: the new file.
        counted: told how many more records were read.

    Returns:
        The table, and what is wrong with the records that are not in it, in their order.
    """
    import pyarrow

    problems: list[Problem] = []
    repeats = Repeats()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, ROWS.arrow_schema) as writer:
        for items in _chunks(source.read()):
            rows = [item for item in items if isinstance(item, Row)]
            problems += [item for item in items if isinstance(item, Problem)]
            for row in rows:
                repeats.add(row)
            columns = {name: [getattr(row, name) for row in rows] for name in ROWS}
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, ROWS.arrow_schema))
            counted(len(items))
    table = Dataset.from_file(str(path))
    repetitions = repeats.find()
    for position, (what, first) in repetitions.items():
        own, other = table[position], table[first]
        text = what.format(repr(own["id"]))
        problems.append(Problem(own["row"], f"{own['place']}: {text} {other['place']}"))
    if repetitions:
        table = table.select(np.setdiff1d(np.arange(len(table)), list(repetitions)))
    return table, [problem.message for problem in sorted(problems)]


class Repeats:
    """Finds rows that repeat the id or the words of an earlier one; takes 32 bytes a row."""

    def __init__(self) -> None:
        self._ids, self._words = bytearray(), bytearray()

    def add(self, row: Row) -> None:
        """Take in the next row."""
        self._ids += _digest(row.id)
        self._words += _digest(row.history, row.prompt, row.response, *_optional(row.rejected), *_optional(row.details))

    def find(self) -> dict[int, tuple[str, int]]:
        """Position of each repetition → what it repeats (a text with a place for its id), and the position of that."""
        first = _first_equal(_as_array(self._ids))
        new = (first == np.arange(len(first))).nonzero()[0]  # the words of a repeated id do not count
        same = new[_first_equal(_as_array(self._words)[new])]
        ids, words = np.setdiff1d(np.arange(len(first)), new), (same != new).nonzero()[0]
        repetitions = {int(i): ("the id {} was already used on", int(first[i])) for i in ids}
        return repetitions | {int(new[i]): ("the same prompt and response as on", int(same[i])) for i in words}


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """[n] the first position with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _as_array(digests: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(digests, dtype="S16")


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def _optional(value: str | None) -> list[str]:
    """What only some rows have, to be put into a digest; other rows have the digest that they always had."""
    return [value] if value else []


def _chunks(items: Iterable[Item]) -> Iterable[list[Item]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, CHUNK)), [])


# ---- token ids ----


def encode_rows(rows: Dataset, encoder: Encoder, path: Path, num_proc: int = 1) -> Dataset:
    """Tokenize a table of rows into Arrow files beside `path`, a thousand at a time in each of the processes.

    Returns:
        A table with a row for every row; `problem` says why there are no token ids, where there are none.
    """
    return rows.map(
        _Encode(encoder),
        batched=True,
        batch_size=CHUNK,
        remove_columns=rows.column_names,
        features=ENCODED,
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint=path.stem,  # its own would hash the tokenizer and every row
        desc="tokenizing",
    )


def ids_to_learn(encoded: Encoded) -> list[int]:
    """Ids of the tokens that are learned, of a pair those of both answers."""
    ids, start, other = encoded.input_ids, encoded.response_start, encoded.rejected_ids or []
    return [*(ids[i] for i in encoded.earlier), *ids[start:], *other[start:]]


class _Encode:
    """Columns of rows to columns with token ids; an object, so that processes can be given it."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        rows = [cut_after_learned(row, self.encoder.train_on == "all") for row in rows_of(columns)]
        records: list[dict[str, Any]] = []
        for row, encoded in zip(rows, encode_with_pairs(self.encoder, rows), strict=True):
            record = {name: getattr(row, name) for name in ("row", "id", "prompt", "response", "source", "place")}
            record |= {"question": _digest(*question(row)), "problem": None, "length": 0}
            record["pair"] = row.rejected is not None
            if isinstance(encoded, ValueError):
                record |= {"problem": f"{row.place}, id {row.id!r}: {encoded}"}
            else:
                record |= vars(encoded) | {"length": max(len(encoded.input_ids), len(encoded.rejected_ids or ()))}
                # of the token ids only what is learned and whole, for a template may put the date before it
                words = (row.history, row.prompt, row.response, *_optional(row.rejected), *_optional(row.details))
                record["digest"] = _digest(row.id, *words, [] if encoded.truncated else ids_to_learn(encoded))
            records.append(record)
        return {name: [record.get(name) for record in records] for name in ENCODED}


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The rows in columns of a table that `write_rows` made."""
    own = [columns[name] for name in ROWS]
    rows = [dict(zip(ROWS, values, strict=True)) for values in zip(*own, strict=True)]
    return [Row(**row | {"history": tuple((role, text) for role, text in row["history"])}) for row in rows]


def question(row: Row) -> tuple[str, ...]:
    """What two rows may not share: the turns before the answer but system prompts, or all of a plain text."""
    return tuple(text.strip() for role, text in row.turns if role != "system") or (row.response.strip(),)


# ---- columns ----


def column(table: Dataset, name: str) -> pyarrow.ChunkedArray:
    """A whole column as a pyarrow `ChunkedArray`; read from the memory map unless rows were taken out."""
    return table.select_columns([name]).with_format("arrow")[:][name]


def has_question(table: Dataset) -> np.ndarray:
    """[N] whether something is asked before a row's answer: not in plain text, nor where all of it was cut off."""
    import pyarrow.compute

    prompted = pyarrow.compute.not_equal(column(table, "prompt"), "").to_numpy()
    cut = column(table, "truncated").to_numpy() & (column(table, "response_start").to_numpy() <= 1)
    return prompted & ~cut


def is_paired(table: Dataset) -> bool:
    """Whether every row is a preference pair whose both answers were asked for."""
    import pyarrow.compute

    return pyarrow.compute.all(column(table, "pair")).as_py()


def longest(tables: Iterable[Dataset]) -> int:
    """Tokens of the longest row of some tables."""
    import pyarrow.compute

    return max((pyarrow.compute.max(column(table, "length")).as_py() for table in tables), default=0)


def source_numbers(table: Dataset, names: Sequence[str]) -> np.ndarray:
    """[N] the position of each row's source among the names, all of which are known."""
    import pyarrow
    import pyarrow.compute

    sources = column(table, "source")
    return pyarrow.compute.index_in(sources, value_set=pyarrow.array(names, sources.type)).to_numpy().astype(np.int64)
