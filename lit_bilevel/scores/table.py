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
from lit_bilevel.scores.density import HIDDEN, LEAST_TRUSTED, MEASURED, density_features, density_ratios

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
    trusted: dict[str, np.ndarray] | None = None
    """[M] the same numbers of the trusted rows, where the file has them."""

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


def columns_of(
    pool_NF: np.ndarray, trusted_MF: np.ndarray | None, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All numbers of the rows by name, float32: the columns of the file, then the other features.

    Args:
        pool_NF: what was measured of the pool rows, F in the order of `FEATURES`, then that of their hidden states.
        trusted_MF: the same of trusted rows; without, or with too few of them, both ratios are NaN, and without hidden
            states `hidden_ratio` is.
        seed: of the folds of the ratios.

    Returns:
        [N] of the pool rows, and [M] of the trusted rows, whose `combined` is on the scale of the pool's.

    Raises:
        UserError: if a loss is not finite.
    """
    rows = len(pool_NF)
    whole_n = pool_NF if trusted_MF is None else np.concatenate([pool_NF, trusted_MF])
    whole_nF, whole_nS = np.split(whole_n, [len(FEATURES)], axis=1)
    columns = {name: whole_nF[:, column] for column, name in enumerate(FEATURES)}
    if wrong := int((~np.isfinite(columns["loss"])).sum()):
        raise UserError(f"the loss of {wrong:,} rows is not finite; check the policy, and `trainer.precision`.")
    columns["pmi"] = columns["loss_without_prompt"] - columns["loss"]
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["ifd"] = columns["loss"] / columns["loss_without_prompt"]
    columns |= {name: np.full(len(whole_n), np.nan, dtype=np.float32) for name in RATIOS}
    if len(whole_n) - rows >= LEAST_TRUSTED:
        measured_nF = density_features(whole_nF)
        columns["density_ratio"] = density_ratios(measured_nF[:rows], measured_nF[rows:], MEASURED, seed)
        if whole_nS.size and np.isfinite(whole_nS).all():
            columns["hidden_ratio"] = density_ratios(whole_nS[:rows], whole_nS[rows:], HIDDEN, seed)
    pool = {name: values_n[:rows].astype(np.float32) for name, values_n in columns.items()}
    trusted = {name: values_n[rows:].astype(np.float32) for name, values_n in columns.items()}
    try:
        pool["combined"] = combine(pool, COMBINED).astype(np.float32)
        trusted["combined"] = combine(pool, COMBINED, trusted).astype(np.float32)
    except UserError:  # no row differs from any other
        pool["combined"] = np.full(rows, np.nan, dtype=np.float32)
        trusted["combined"] = np.full(len(whole_n) - rows, np.nan, dtype=np.float32)
    names = dict.fromkeys((*COLUMNS, *FEATURES))
    return {name: pool[name] for name in names}, {name: trusted[name] for name in names}


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
    path: Path,
    ids: pyarrow.ChunkedArray | Sequence[str],
    columns: Mapping[str, np.ndarray],
    made_of: Mapping[str, Any],
    trusted: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the file; it is there whole or not at all.

    Args:
        path: a parquet file.
        ids: [N] a pyarrow column or a list.
        columns: [N] numbers by name.
        made_of: what the numbers come from, kept in the file's metadata.
        trusted: [M] the same numbers of the trusted rows, kept there, too.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": ids} | {name: pyarrow.array(values) for name, values in columns.items()})
    others = {name: values.tolist() for name, values in (trusted or {}).items() if name in COLUMNS}
    table = table.replace_schema_metadata({"lit_bilevel": json.dumps(made_of), "trusted": json.dumps(others)})
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
    metadata = table.schema.metadata or {}
    made_of, others = (json.loads(metadata.get(key, b"null")) for key in (b"lit_bilevel", b"trusted"))
    trusted = {name: np.array(values, dtype=np.float32) for name, values in (others or {}).items()}
    return Scores(ids, {name: table[name].to_numpy() for name in numbers}, made_of, trusted or None)


def seconds_taken(path: str | Path) -> float:
    """Seconds that a file of scores says it took; 0 where it does not."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"lit_bilevel", b"{}")).get("seconds", 0.0)
