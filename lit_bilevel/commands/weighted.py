"""Joins the weights or scores of a file with the rows of a pool, by id.

Left out: reading the pool, and the choice of rows.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_bilevel.commands.originals import Pool
from lit_bilevel.errors import UserError
from lit_bilevel.scores.columns import DIRECTION, RATIOS

DRAWABLE = ("weight", "weight_refined", *RATIOS)
"""What rows can be drawn in proportion to."""


@dataclass
class Joined:
    """The rows of a pool that have a weight, in the order of the pool.

    Args:
        position_n: [n] position of each in the pool.
        weight_n: [n] its weight, or score.
        source_n: [n] number of its source.
        sources: names of the sources.
        sign: −1 where low scores speak for a row.
    """

    position_n: np.ndarray
    weight_n: np.ndarray
    source_n: np.ndarray
    sources: list[str]
    sign: int = 1


@dataclass
class Weights:
    """The columns of a `weights.parquet`, or of a file of scores, which has no rows and sources."""

    id: list[str]
    row: np.ndarray
    weight: np.ndarray
    source: list[str]
    sign: int = 1


def read_weights(path: str, by: str = "weight") -> Weights:
    """Weights of a run, or scores.

    Raises:
        UserError: if the file is missing or is not such a table.
    """
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the `weights.parquet` of a run, or a file of scores.")
    scored = by in DIRECTION and by != "weight"
    try:
        schema = pyarrow.parquet.read_schema(path)
        if by not in schema.names:
            numbers = [field.name for field in schema if pyarrow.types.is_floating(field.type)]
            raise UserError(f"{path} has no column `{by}`; `--by` can be: {', '.join(numbers) or 'nothing there'}.")
        table = pyarrow.parquet.read_table(path, columns=["id", by, *(() if scored else ("row", "source"))])
        columns = {name: table[name] for name in table.column_names}
        ids, values = columns["id"].to_pylist(), columns[by].to_numpy().astype(np.float64)
        row = np.full(len(ids), -1) if scored else columns["row"].to_numpy()
        source = [""] * len(ids) if scored else columns["source"].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path} is not a table with `id`, `row`, `source` and `{by}` ({error}).") from error
    if missing := int((~np.isfinite(values)).sum()):
        raise UserError(f"{path} has no `{by}` for {missing:,} of {len(values):,} rows; use another column.")
    if not len(values) or (by in DRAWABLE and values.min() < 0):
        raise UserError(f"{path} has no weights, or some that are not numbers of at least 0; write it anew.")
    return Weights(ids, row, values, source, DIRECTION.get(by, 1))


def join(pool: Pool, weights: Weights, options: argparse.Namespace) -> Joined:
    """Find the weight of every row of the pool.

    Raises:
        UserError: if the weights are not those of this pool.
    """
    named = ", ".join(options.pool)
    if not pool.has_ids and len(weights.row) and weights.row.max() >= len(pool.ids):
        raise UserError(
            f"{named} has {len(pool.ids)} rows, no column {options.id_column!r}, and the weights go up to row"
            f" {weights.row.max()}; give the pool that they were learned on, or its `--id_column`."
        )
    position_of = {key: number for number, key in enumerate(weights.id)}
    positions, matches, seen = [], [], set()
    for position, key in enumerate(pool.ids):
        if key is not None and key in position_of and key not in seen:
            seen.add(key)
            positions.append(position)
            matches.append(position_of[key])
    if not positions:
        raise UserError(
            f"no row of {named} has an id that is in {options.weights} (the first: {pool.ids[0]!r} and"
            f" {weights.id[0]!r}); give the pool that they were learned on, or its `--id_column`."
        )
    without, lost = len(pool.ids) - len(positions), len(weights.id) - len(positions)
    if without:
        sys.stdout.write(f"{without:,} rows of the pool have no weight (they were not trained on) and are left out\n")
    if lost:
        sys.stdout.write(f"{lost:,} weights belong to rows that the pool does not have\n")
    sources = sorted(set(weights.source))
    number = {name: i for i, name in enumerate(sources)}
    numbers = np.array([number[weights.source[i]] for i in matches])
    return Joined(np.array(positions), weights.weight[matches], numbers, sources, weights.sign)
