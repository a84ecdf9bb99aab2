"""Combines several scores into one, and makes weights of it.

    z_i = Σ_columns  direction · normal score of the row's rank        scaled to standard deviation 1
    w_i = σ(sharpness · z_i)                                           scaled to mean 1

A column counts by its ranks, which tails cannot spoil: half a standard deviation is as many rows in every column. Its
normal score is the quantile of a standard normal at (rank − ½) / rows, equal values at their mean rank. So a density
ratio and its logarithm are the same here. For example, a row at the 84th percentile of two columns has 1 in each.
A row that a column does not know (NaN) has 0 in it and is decided by the others. The scores are different views of a
row whose logarithms add up, so their sum is a logarithm of weights; σ bounds them, as good rows stay many.

Left out: weights of the columns; they would have to be fitted on a truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.scores.columns import DIRECTION

SHARPNESS = 2.0
"""How far apart weights are that begin at a combined score: rows one standard deviation from the mean, 7 to 1."""


def combine(
    columns: Mapping[str, np.ndarray], names: Sequence[str], others: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """[N] the sum of standardised columns, high for rows to be kept, mean 0 and standard deviation 1; float64.

    Args:
        columns: [N] numbers by name.
        names: those that are added.
        others: [M] the same of other rows; where they are given, the result is theirs, on the scale of the first.

    Raises:
        UserError: for a name that is not there or has no direction, or if no row differs from any other.
    """
    if unknown := [name for name in names if name not in columns or name not in DIRECTION]:
        known = [name for name in columns if name in DIRECTION]
        raise UserError(f"there is no score {unknown[0]!r} to be added; there are: {', '.join(known)}.")
    total_N = np.sum([DIRECTION[name] * normal_scores(columns[name]) for name in names], axis=0)
    spread = float(np.std(total_N))
    if not spread > 0:
        raise UserError(f"all rows are equal in {', '.join(names)}, so they cannot be told apart; use other scores.")
    if others is not None:
        mean = total_N.mean()
        total_N = np.sum([DIRECTION[name] * normal_scores(others[name], columns[name]) for name in names], axis=0)
        return (total_N - mean) / spread
    return (total_N - total_N.mean()) / spread


def normal_scores(values_N: np.ndarray, among_M: np.ndarray | None = None) -> np.ndarray:
    """[N] quantiles of a standard normal at the rows' ranks, float64; 0 where a value is not finite.

    Args:
        values_N: of the rows.
        among_M: values whose ranks count; by default those of the rows themselves.
    """
    from scipy.stats import norm

    known_N = np.isfinite(values_N)
    among = values_N[known_N] if among_M is None else among_M[np.isfinite(among_M)]
    found_N = np.zeros(len(values_N))
    if known_N.any() and len(among):
        among, values = np.sort(among), values_N[known_N]
        below, upto = among.searchsorted(values), among.searchsorted(values, "right")
        share = (below + upto) / (2 * len(among))  # of equal values, those at their mean rank
        found_N[known_N] = norm.ppf(share.clip(0.5 / len(among), 1 - 0.5 / len(among)))
    return found_N


def prior_weights(combined_N: np.ndarray, sharpness: float) -> np.ndarray:
    """[N] weights of mean 1, σ(sharpness · z).

    Args:
        combined_N: z, of `combine`.
        sharpness: at least 0; 0 gives equal weights.
    """
    weight_N = 1 / (1 + np.exp(-sharpness * combined_N))
    return weight_N / weight_N.mean()
