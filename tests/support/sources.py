"""Sources read at once, for tests that look at rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lit_bilevel.data import rows
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.table import rows_of, write_rows
from lit_bilevel.errors import gather
from lit_bilevel.types import Row
from support.files import TOY


class Source(rows.Source):
    """A source that is read at once, through the table."""

    def __init__(self, path: str | list[str], on_bad_row: str = "error", **settings):
        super().__init__(path, **settings)
        self.on_bad_row, self.skipped = on_bad_row, []

    def rows(self) -> list[Row]:
        """The good rows; `skipped` has what is wrong with the others."""
        with tempfile.TemporaryDirectory() as folder:
            table, self.skipped = write_rows(self, Path(folder) / "rows.arrow")
            if self.skipped and self.on_bad_row == "error":
                raise gather("bad data", self.skipped)
            return rows_of(table[:])


def module(small, **settings) -> BilevelDataModule:
    return BilevelDataModule(
        small["pool"], small["validation"], small["test"], tokenizer=str(TOY / "model"), batch_size=8, **settings
    )
