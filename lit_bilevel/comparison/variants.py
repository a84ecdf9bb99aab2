"""Methods under names of one's own: a method with settings, and perhaps a part of the data, that only it has.

    contrast:                                      a row of the table; also two_stage:contrast, best:contrast,mixing,
                                                   of which the first sees the rows of `contrast` under its own settings
      method: value_function@sigmoid               any method that is no variant itself
      flags: {model.optimizer.lr: 1.0e-5}          settings of `lit-bilevel fit`, after those of the method
      pool_rows: 1300                              so many rows of the pool …
      corrupted: 0.8                               … with this share of corrupted ones, by the truth file
      validation_rows: 50                          so many rows of the validation file
      refine: {responses: 1}                       settings of `SelfRefine`, of a method with `+refine`

The parts are drawn by seed 0, stratified as `--subset` does. Left out: parts of the test file, which judges all alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_bilevel.comparison.rows import stratify
from lit_bilevel.errors import UserError


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own.

    Args:
        method: its name.
        flags: settings by name.
        pool_rows: rows of the pool that it sees, or `None` for all.
        corrupted: share of corrupted ones among them, or `None` for that of the pool.
        validation_rows: rows of the validation file that it sees, or `None` for all.
        refine: settings of `SelfRefine`, over those of the configuration.
    """

    method: str
    flags: dict[str, Any] | None = None
    pool_rows: int | None = None
    corrupted: float | None = None
    validation_rows: int | None = None
    refine: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("flags", "refine"):
            if not isinstance(getattr(self, name), dict | None):
                raise UserError(
                    f"`{name}: {getattr(self, name)}` is no table of settings; write `{name}: {{NAME: VALUE}}`."
                )
        for name in ("pool_rows", "validation_rows"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"`{name}: {value!r}` is no number of rows; give one from 1, or leave it out for all.")
        if not isinstance(self.corrupted, int | float | None):
            raise UserError(f"`corrupted: {self.corrupted!r}` is no share; give a number such as 0.5.")
        if self.corrupted is not None and not (self.pool_rows and 0 <= self.corrupted < 1):
            raise UserError(f"`corrupted: {self.corrupted}` must be in [0, 1) and needs `pool_rows`.")

    @property
    def rows(self) -> Variant | None:
        """The same rows under no settings, for a method that is built on this one; `None` where it sees all rows."""
        if self.pool_rows is None and self.validation_rows is None:
            return None
        return replace(self, flags=None, refine=None)

    def options(self) -> tuple[str, ...]:
        """The settings as flags."""
        given = (self.flags or {}).items()
        return tuple(f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given)

    def validation(self, sources: Sequence[str]) -> np.ndarray:
        """Positions of the validation rows that it sees, in order, given the source of each row."""
        return stratify(sources, self.validation_rows or len(sources), seed=0, what="`validation_rows`")

    def pool(self, sources: Sequence[str], kinds: Sequence[str] | None) -> np.ndarray:
        """Positions of the pool rows that it sees, in order.

        Args:
            sources: source of each row.
            kinds: kind of corruption of each row, "" for clean ones; `None` without a truth file.

        Raises:
            UserError: if there are too few rows of either sort.
        """
        strata = list(zip(sources, kinds or [""] * len(sources), strict=True))
        count = self.pool_rows or len(sources)
        if self.corrupted is None:
            return stratify(strata, count, seed=0, what="`pool_rows`")
        if kinds is None:
            raise UserError("`corrupted` of a variant needs to know which rows are; give `--data.truth`.")
        parts = []
        for bad, wanted in ((True, round(count * self.corrupted)), (False, count - round(count * self.corrupted))):
            rows = np.array([i for i, kind in enumerate(kinds) if bool(kind) == bad], dtype=np.int64)
            if wanted > len(rows):
                sort = "corrupted" if bad else "clean"
                raise UserError(
                    f"a variant asks for {wanted:,} {sort} rows and the pool has {len(rows):,}; lower `pool_rows`."
                )
            if wanted:
                parts.append(rows[stratify([strata[row] for row in rows], wanted, seed=0)])
        return np.sort(np.concatenate(parts))


def read_variants(path: str) -> dict[str, Variant]:
    """The variants of a YAML file by their names.

    Raises:
        UserError: if the file is missing or not of this shape.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; check `--variants`.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    names = [field.name for field in fields(Variant)]
    variants = {}
    for name, settings in content.items() if isinstance(content, dict) else [(path, None)]:
        if not isinstance(settings, dict) or "method" not in settings or set(settings) - set(names):
            raise UserError(
                f"{path}: {name!r} must have `method` and may have {', '.join(names[1:])}, and nothing else."
            )
        try:
            variants[str(name)] = Variant(**settings | {"method": str(settings["method"])})
        except UserError as error:
            raise UserError(f"{path}: {name!r}: {error}") from error
    return variants
