"""Statistics of a table of weights, taken once an epoch: O(N log N), never in a step.

    rank correlation   Spearman's ρ = Pearson's of the ranks, ties at their mean rank
    mass of a source   Σ_{i in source} w_i / N
    precision, recall  of "the k lowest weights are corrupted": corrupted among them / k, and / all corrupted

Left out: statistics of a step; the weights keep running sums for those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = (5, 25, 50, 75, 95)


def ranks(values_N: Tensor) -> Tensor:
    """[N] ranks from 0 for the lowest, float64; equal values share their mean rank."""
    _, place_N, count = values_N.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[place_N]


def correlation(a_N: Tensor, b_N: Tensor) -> float | None:
    """Pearson's correlation; `None` where one of the two does not vary."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    norm = a_N.norm() * b_N.norm()
    return float(a_N @ b_N / norm) if norm > 0 else None


def quantile(values_N: Tensor, share: float) -> float:
    """The value that this share of the values does not exceed; `torch.quantile` has a limit of 16 million."""
    return float(values_N.sort().values[round(share * (len(values_N) - 1))])


def quantiles(values_N: Tensor) -> dict[str, float]:
    """The quantiles of `QUANTILES`, by names that sort: `05`, `25` …"""
    ordered = values_N.sort().values
    last = len(ordered) - 1
    return {f"{q:02d}": float(ordered[round(q / 100 * last)]) for q in QUANTILES}


def source_mass(weight_N: Tensor, source_N: Tensor, names: Sequence[str], limit: int = 20) -> dict[str, float]:
    """Share of the whole weight that each source has, for the `limit` sources with most rows; empty for one source."""
    if len(names) < 2:
        return {}
    mass = torch.bincount(source_N, weight_N, len(names)) / len(weight_N)
    largest = torch.bincount(source_N, minlength=len(names)).argsort(descending=True, stable=True)[:limit]
    return {names[i] or "(none)": float(mass[i]) for i in largest.tolist()}


def precision_recall(weight_N: Tensor, corrupted_N: Tensor, points: int = 50) -> list[tuple[float, float]]:
    """Pairs (recall, precision) of calling the rows of least weight corrupted; equal weights are called together.

    Args:
        weight_N: [N] weights.
        corrupted_N: [N] which rows are corrupted.
        points: most pairs that are returned, spread evenly over the rows.

    Returns:
        Pairs by rising recall; empty where no row is corrupted.
    """
    if not corrupted_N.any():
        return []
    weight_N, order_N = weight_N.sort()
    last = torch.tensor([True])
    ends = torch.cat([weight_N[1:] != weight_N[:-1], last]).nonzero()[:, 0]
    ends = ends[torch.linspace(0, len(ends) - 1, min(points, len(ends))).round().long()]
    hits = corrupted_N[order_N].double().cumsum(0)
    return list(zip((hits / hits[-1])[ends].tolist(), (hits[ends] / (ends + 1)).tolist(), strict=True))


def histogram(weight_N: Tensor, bins: int = 60) -> dict[str, list[float]]:
    """Counts and edges of equal bins from 0 to the highest weight."""
    top = max(float(weight_N.max()), 1e-9)
    counts = torch.histc(weight_N, bins, 0, top)
    return {"counts": counts.tolist(), "edges": torch.linspace(0, top, bins + 1).tolist()}
