"""Replaces a file as a whole: who reads it finds the old one or the new one, whenever the process is killed.

    with replacing(folder / "weights.parquet") as partial:
        pyarrow.parquet.write_table(table, partial)

The new file is written beside its place (across file systems a move would be a copy, which a kill leaves half done),
waited for until it is on disk, and renamed. Left out: folders, which no system replaces in one step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write the new file; at the end it takes the place of `path`, unless an error left the block.

    Args:
        path: the file; its folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # nothing is there any more where all went well
    if os.name == "posix":  # elsewhere folders cannot be opened, and the rename has to do
        number = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file; halves of characters, which JSON can hold and UTF-8 cannot, become question marks."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb+") as file:  # Windows syncs only what can be written
        os.fsync(file.fileno())
