"""Reads and writes the file of scores: one row a pool row, `id` and the columns of `columns.py`.

    weights = weights_from_score("ifd", read_scores("scores.parquet").columns["ifd"])

Left out: joining it to a pool; `select` and `compare` do that by id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.files import replacing
from lit_bilevel.scores.columns import COLUMNS, COMBINED, DIRECTION, FEATURES, RATIOS
from lit_bilevel.scores.combination import SHARPNESS, combine, prior_weights
from lit_bilevel.scores.density import LEAST_TRUSTED, density_features, density_ratio, hidden_ratio

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Scores:
    """Scores of a pool.

    Args:
        ids: [N] the users' keys.
        columns: [N] float32 numbers by name.
    """

    ids: list[str]
    columns: dict[str, np.ndarray]
    made_of: Mapping[str, Any] | None = None
    """What the numbers come from, where the file says so."""

    def orient(self, name: str) -> np.ndarray:
        """[N] a column with its sign turned where low values speak for a row, float64; high is for keeping.

        Raises:
            UserError: if a row has no such score, or there is no such column.
        """
        if name not in self.columns:
            raise UserError(f"there is no score {name!r}; there are: {', '.join(self.columns)}.")
        values = self.columns[name].astype(np.float64)
        if missing := int((~np.isfinite(values)).sum()):
            raise UserError(
                f"{missing:,} of {len(values):,} rows have no `{name}`, because {why_missing(name)}; use another score."
            )
        return DIRECTION.get(name, 1) * values


def why_missing(name: str) -> str:
    """Why a row can be without this score."""
    if name in RATIOS:
        unknown = ", or the policy shows no hidden states" if name == "hidden_ratio" else ""
        return f"fewer than {LEAST_TRUSTED} validation rows train the weights{unknown}"
    if name == "combined":
        return f"{', '.join(COMBINED)} tell no row from another"
    return "their response was cut at `data.max_length`" if name == "end_loss" else "they have no prompt"


def columns_of(pool_NF: np.ndarray, trusted_MF: np.ndarray | None, seed: int = 0) -> dict[str, np.ndarray]:
    """All numbers of the pool rows by name, float32: the columns of the file, then the other features.

    Args:
        pool_NF: what was measured of the pool rows, F in the order of `FEATURES`, then that of their hidden states.
        trusted_MF: the same of trusted rows; without, or with too few of them, both ratios are NaN, and without hidden
            states `hidden_ratio` is.
        seed: of the folds of the ratios.

    Raises:
        UserError: if a loss is not finite.
    """
    pool_NF, pool_NS = np.split(pool_NF, [len(FEATURES)], axis=1)
    columns = {name: pool_NF[:, column] for column, name in enumerate(FEATURES)}
    if wrong := int((~np.isfinite(columns["loss"])).sum()):
        raise UserError(f"the loss of {wrong:,} rows is not finite; check the policy, and `trainer.precision`.")
    columns["pmi"] = columns["loss_without_prompt"] - columns["loss"]
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["ifd"] = columns["loss"] / columns["loss_without_prompt"]
    columns |= {name: np.full(len(pool_NF), np.nan, dtype=np.float32) for name in RATIOS}
    if trusted_MF is not None and len(trusted_MF) >= LEAST_TRUSTED:
        trusted_MF, trusted_MS = np.split(trusted_MF, [len(FEATURES)], axis=1)
        ratio_N = density_ratio(density_features(pool_NF), density_features(trusted_MF), seed)
        columns["density_ratio"] = ratio_N.astype(np.float32)
        if pool_NS.size and np.isfinite(pool_NS).all() and np.isfinite(trusted_MS).all():
            columns["hidden_ratio"] = hidden_ratio(pool_NS, trusted_MS, seed).astype(np.float32)
    try:
        columns["combined"] = combine(columns, COMBINED).astype(np.float32)
    except UserError:  # no row differs from any other
        columns["combined"] = np.full(len(pool_NF), np.nan, dtype=np.float32)
    return {name: columns[name] for name in dict.fromkeys((*COLUMNS, *FEATURES))}


def weights_from_score(name: str, directed_N: np.ndarray) -> np.ndarray:
    """[N] weights of mean 1 from a score: a ratio is one already, others go through σ(z) with z their z-score.

    `combined` gives the weights that `ScoredPrior` begins at.

    Args:
        name: of the score.
        directed_N: its values, high for rows to be kept.
    """
    if name in RATIOS:
        weight_N = directed_N
    elif name == "combined":
        weight_N = prior_weights(directed_N, SHARPNESS)
    else:
        z_N = (directed_N - directed_N.mean()) / max(float(directed_N.std()), np.finfo(np.float64).tiny)
        weight_N = 1 / (1 + np.exp(-z_N))
    return weight_N / weight_N.mean()


def write_scores(
    path: Path, ids: pyarrow.ChunkedArray | Sequence[str], columns: Mapping[str, np.ndarray], made_of: Mapping[str, Any]
) -> None:
    """Write the file; it is there whole or not at all.

    Args:
        path: a parquet file.
        ids: [N] a pyarrow column or a list.
        columns: [N] numbers by name.
        made_of: what the numbers come from, kept in the file's metadata.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": ids} | {name: pyarrow.array(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({"lit_bilevel": json.dumps(made_of)})
    with replacing(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def read_scores(path: str | Path) -> Scores:
    """The scores in a file.

    Raises:
        UserError: if the file is missing or is not such a table.
    """
    import pyarrow
    import pyarrow.parquet

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give a file that `lit-bilevel score` wrote.")
    try:
        table = pyarrow.parquet.read_table(path)
        ids = table["id"].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path} is not a table of scores ({error}); `lit-bilevel score` writes one.") from error
    numbers = [field.name for field in table.schema if pyarrow.types.is_floating(field.type)]
    made_of = json.loads((table.schema.metadata or {}).get(b"lit_bilevel", b"null"))
    return Scores(ids, {name: table[name].to_numpy() for name in numbers}, made_of)


def seconds_taken(path: str | Path) -> float:
    """Seconds that a file of scores says it took; 0 where it does not."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"lit_bilevel", b"{}")).get("seconds", 0.0)
