"""What a table of weights is summed up by, once an epoch: O(N log N), never in a step.

    rank correlation   Spearman's ρ = Pearson's of the ranks, ties at their mean rank
    mass of a source   Σ_{i in source} w_i / N

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


def histogram(weight_N: Tensor, bins: int = 60) -> dict[str, list[float]]:
    """Counts and edges of equal bins from 0 to the highest weight."""
    top = max(float(weight_N.max()), 1e-9)
    counts = torch.histc(weight_N, bins, 0, top)
    return {"counts": counts.tolist(), "edges": torch.linspace(0, top, bins + 1).tolist()}
