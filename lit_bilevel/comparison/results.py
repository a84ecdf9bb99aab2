"""Reads and writes the files of a comparison: `results.csv`, a row a run, and `test_losses.parquet`, a row a test row.

A run is finished when its row is in `results.csv`. Files are written beside their place and moved there, so a kill
leaves whole ones. Left out: merging two folders.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.files import replace_text, replacing

if TYPE_CHECKING:
    import pyarrow

Result = dict[str, Any]
Losses = dict[str, dict[int, np.ndarray]]
"""[n] losses of the test rows, by method and seed."""


class Results:
    """What is known so far, on disk and in memory.

    Args:
        folder: of the comparison.
        settings: what all runs share; a folder with results under other settings is refused.

    Raises:
        UserError: if the folder holds another comparison.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.require(settings)
        self.rows = self._read()

    def require(self, settings: dict[str, Any]) -> None:
        """Note more of what all runs share.

        Raises:
            UserError: if it is not what the runs in the folder share.
        """
        path = self.folder / "comparison.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        changed = [name for name, value in settings.items() if known.get(name, value) != value]
        if changed:
            raise UserError(
                f"{self.folder} holds results under other settings ({', '.join(changed)}); choose another `--output`,"
                " or forget them with `--fresh`."
            )
        replace_text(path, json.dumps(known | settings, indent=2) + "\n")

    def _read(self) -> list[Result]:
        path = self.folder / "results.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8") as file:
            return [{k: _number(k, v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]

    def find(self, method: str, seed: int) -> Result | None:
        """The row of a finished run."""
        return next((row for row in self.rows if row["method"] == method and row["seed"] == seed), None)

    def add(self, row: Result) -> None:
        """Add a finished run."""
        self.rows.append(row)
        names = list(dict.fromkeys(name for known in self.rows for name in known))
        with (
            replacing(self.folder / "results.csv") as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def run_folder(self, method: str, seed: int) -> Path:
        """Folder of a run."""
        return self.folder / method.replace(":", "-").replace(",", "_") / f"seed{seed}"

    def write_losses(self) -> Losses:
        """Write `test_losses.parquet`: `id`, `tokens`, and each method's loss of the row, averaged over its seeds.

        Returns:
            [n] losses by method and seed, in the order of the file.
        """
        import pyarrow
        import pyarrow.parquet

        table: pyarrow.Table | None = None
        losses: Losses = {}
        for row in self.rows:
            path = self.run_folder(str(row.get("chosen") or row["method"]), row["seed"]) / "test_losses.parquet"
            if not path.is_file():
                raise UserError(
                    f"{path} is missing, though its run is in results.csv; remove that line there, and the run is"
                    " repeated."
                )
            run_losses = pyarrow.parquet.read_table(path)
            if table is None:
                table = run_losses.select(["id", "tokens"])
            losses.setdefault(row["method"], {})[row["seed"]] = run_losses["loss"].to_numpy()
        assert table is not None  # there is a row, or there would be nothing to write down
        for method, parts in losses.items():
            table = table.append_column(method, pyarrow.array(np.mean(list(parts.values()), axis=0)))
        with replacing(self.folder / "test_losses.parquet") as partial:
            pyarrow.parquet.write_table(table, partial)
        return losses

    def monitor_losses(self) -> Losses:
        """[m] losses of the monitor rows at each run's best checkpoint, by method and seed.

        Left out: a method that is the best of others, which has none of its own; runs of earlier versions, which kept
        none; variants with other monitor rows than the first run.
        """
        import pyarrow.parquet

        losses: Losses = {}
        ids: list[str] | None = None
        for row in self.rows:
            path = self.run_folder(row["method"], row["seed"]) / "monitor_losses.parquet"
            if "chosen" not in row and path.is_file():
                table = pyarrow.parquet.read_table(path)
                ids = ids or table["id"].to_pylist()
                if table["id"].to_pylist() == ids:
                    losses.setdefault(row["method"], {})[row["seed"]] = table["loss"].to_numpy()
        return losses


def _number(name: str, text: str) -> str | float:
    if name in ("method", "chosen"):
        return text
    return int(text) if name == "seed" else float(text)
