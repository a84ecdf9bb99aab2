"""Rows with their token ids as an Arrow table, made a thousand rows at a time so that memory stays near its size.

Left out: a cache on disk; a run encodes its files once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from lit_bilevel.data.encode import Encoder
from lit_bilevel.types import Row

CHUNK = 1000
FEATURES = Features(
    {
        "row": Value("int64"),
        "id": Value("string"),
        "prompt": Value("large_string"),
        "response": Value("large_string"),
        "source": Value("int64"),
        "input_ids": List(Value("int32")),
        "response_start": Value("int64"),
        "truncated": Value("bool"),
        "earlier": List(Value("int32")),
    }
)


def encoded_table(rows: Sequence[Row], encoder: Encoder, source_names: Sequence[str]) -> tuple[Dataset, list[str]]:
    """The table, and what is wrong with the rows that are not in it.

    Args:
        rows: the rows.
        encoder: for their tokenizer.
        source_names: names of the sources; a row's number is its position here, or -1.
    """
    numbers = {source: number for number, source in enumerate(source_names)}
    lost: list[str] = []
    parts = []
    for start in range(0, max(1, len(rows)), CHUNK):
        part = rows[start : start + CHUNK]
        records: list[dict[str, Any]] = []
        for row, encoded in zip(part, encoder.rows(part), strict=True):
            if isinstance(encoded, ValueError):
                lost.append(f"{row.place}, id {row.id!r}: {encoded}")
                continue
            written = {"row": row.row, "id": row.id, "prompt": row.prompt, "response": row.response}
            records.append(written | {"source": numbers.get(row.source, -1)} | vars(encoded))
        columns = {name: [record[name] for record in records] for name in FEATURES}
        parts.append(Dataset.from_dict(columns, features=FEATURES))
    return concatenate_datasets(parts), lost
