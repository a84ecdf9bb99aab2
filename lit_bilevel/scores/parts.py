"""Keeps a pass in parts, each a file of its own, so that a killed pass goes on where it was.

Rows are sorted by length and cut into parts; a part is the unit of work of a process and of the disk. The cut depends
on the rows alone, so one process or several, at once or in several attempts, compute the same batches.
Parts of other rows or of another policy, told by a key, are removed. Left out: sharing work as it comes; parts are
dealt out in turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.files import replacing

LEAST, MOST, PARTS = 32, 4096, 256
"""Fewest and most rows of a part, and how many parts a pass has between these."""


@dataclass(frozen=True)
class Part:
    """Some rows of a set, of like length.

    Args:
        number: of the part, which names its file.
        set: name of the set.
        rows: positions in the set.
    """

    number: int
    set: str
    rows: np.ndarray


def plan(length_n: Mapping[str, np.ndarray]) -> list[Part]:
    """The parts of some sets, the longest rows first, so that too little memory shows at once.

    Args:
        length_n: tokens of every row of each set.
    """
    size = min(MOST, max(LEAST, -(-sum(map(len, length_n.values())) // PARTS)))
    parts: list[Part] = []
    for name, lengths in length_n.items():
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, len(order), size):
            parts.append(Part(len(parts), name, order[start : start + size]))
    return parts


class PartFiles:
    """A folder with the finished parts of a pass.

    Args:
        folder: where they lie.
        key: what the numbers depend on; every value is compared as JSON.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]):
        self.folder, self.key = folder, json.dumps(key, sort_keys=True)

    def open(self) -> int:
        """Make the folder, without parts of another key; for one process, before the others look.

        Returns:
            How many parts are there.

        Raises:
            UserError: if it exists and is no such folder.
        """
        known = self.folder / "key.json"
        if self.folder.exists() and not known.is_file():
            raise UserError(f"{self.folder} is where a pass keeps its parts, and it has others' files; move it away.")
        if self.folder.exists() and known.read_text() != self.key:
            shutil.rmtree(self.folder)
        if not self.folder.exists():  # renamed when the key is in it, or a kill would leave a folder of nobody's
            new = self.folder.with_name(self.folder.name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            (new / "key.json").write_text(self.key)
            new.rename(self.folder)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()
        return len(list(self.folder.glob("*.npy")))

    def has(self, part: Part) -> bool:
        """Whether a part is finished."""
        return self._path(part).exists()

    def write(self, part: Part, table_nF: np.ndarray) -> None:
        """Keep a finished part; the file is there whole or not at all."""
        with replacing(self._path(part)) as partial, partial.open("wb") as file:
            np.save(file, table_nF)

    def read(self, parts: list[Part], rows: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The whole tables [n, F] of all sets.

        Args:
            parts: all of the plan, finished.
            rows: the size of each set.
        """
        tables: dict[str, np.ndarray] = {}
        for part in parts:
            table_nF = np.load(self._path(part))
            whole = tables.setdefault(part.set, np.empty((rows[part.set], table_nF.shape[1]), table_nF.dtype))
            whole[part.rows] = table_nF
        return tables

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _path(self, part: Part) -> Path:
        return self.folder / f"{part.number:05d}.npy"
