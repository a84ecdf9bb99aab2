"""Draws the figures of a finished fit, as PNG in `figures/` of the run folder; needs the extra `figures` (matplotlib).

    weights        distribution of the weights of each source
    kinds          the same for clean rows and each kind of corruption, where `data.truth` is given
    trajectories   weights of sampled rows over the epochs
    losses         upper, lower and monitor loss over the steps
    refinement     log-probability of the generated answers, round by round, and the weights of refined rows
    overview       weights (by kind or by source) beside the losses

Drawn from the files of the run, so they show what is on disk. Left out: figures while a run goes; TensorBoard has
curves for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lit_bilevel.inspection.curves import read_curves, thin
from lit_bilevel.inspection.folder import read_lines
from lit_bilevel.inspection.page import COLOURS
from lit_bilevel.inspection.truth import read_truth

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from matplotlib.figure import Figure, SubFigure

LOSSES = ("upper/loss", "lower/loss", "monitor/loss")
CLEAN, GOOD, CORRUPTED = "clean", *COLOURS[:2]
LEAST = 1e-3
"""Smaller weights are drawn here, where the scale is logarithmic."""


def draw(run: Path, truth: str | None = None) -> dict[str, Figure]:
    """Draw all figures that a run folder has data for, and write them to `figures/`.

    Args:
        run: the run folder.
        truth: the truth file of its pool.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paints: dict[str, Callable[[Figure | SubFigure, Path], bool]] = {
        "weights": _weights,
        "kinds": functools.partial(_kinds, truth=truth),
        "trajectories": _trajectories,
        "losses": _losses,
        "refinement": _refinement,
        "overview": functools.partial(_overview, truth=truth),
    }
    figures = {}
    for name, paint in paints.items():
        figure = Figure(figsize=(10, 4) if name == "overview" else (6.4, 4), dpi=120, layout="constrained")
        if paint(figure, run):
            figure.savefig(folder / f"{name}.png")
            figures[name] = figure
    return figures


def _table(run: Path) -> pyarrow.Table | None:
    import pyarrow.parquet

    path = run / "weights.parquet"
    return pyarrow.parquet.read_table(path) if path.is_file() else None


def _weights(figure: Figure | SubFigure, run: Path) -> bool:
    table = _table(run)
    if table is None:
        return False
    _distributions(figure, table["weight"].to_numpy(), [name or "all rows" for name in table["source"].to_pylist()])
    return True


def _kinds(figure: Figure | SubFigure, run: Path, truth: str | None) -> bool:
    table = _table(run)
    if table is None or truth is None:
        return False
    kinds = [kind or CLEAN for kind in read_truth(truth, table["id"].to_pylist())]
    _distributions(figure, table["weight"].to_numpy(), kinds)
    return True


def _overview(figure: Figure | SubFigure, run: Path, truth: str | None) -> bool:
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    return (_kinds(left, run, truth) or _weights(left, run)) and _losses(right, run)


def _distributions(figure: Figure | SubFigure, weights: np.ndarray, groups: list[str], most: int = 8) -> None:
    """One histogram a group, above each other on one scale; the groups with most rows, `clean` first."""
    import numpy as np

    names, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shown = sorted(range(len(names)), key=lambda i: (names[i] != CLEAN, -counts[i]))[:most]
    edges = np.linspace(0, np.quantile(weights, 0.99) or 1, 50)
    all_axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, i in zip(all_axes, shown, strict=True):
        colour = CORRUPTED if CLEAN in names and names[i] != CLEAN else GOOD
        axes.hist(np.clip(weights[number == i], 0, edges[-1]), edges, density=True, color=colour)
        axes.axvline(1, color="0.5", linewidth=0.8)
        axes.set_ylabel(f"{names[i]}\n{counts[i]:,} rows", rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.spines[["top", "left", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("weight (mean 1; the highest 1 % in the last bar)")
    figure.suptitle("Weights of the rows")


def _trajectories(figure: Figure | SubFigure, run: Path) -> bool:
    epochs = read_lines(run / "inspection" / "epochs.jsonl")
    if not epochs:
        return False
    axes = figure.subplots()
    same = [epoch for epoch in epochs if epoch["rows"] == epochs[-1]["rows"]]  # `inspect.sampled` may have changed
    begun = [1] if len(same) == len(epochs) and epochs[0]["step"] > 0 else []  # else they began as something else
    epochs = same
    steps = [*(0 for _ in begun), *(epoch["step"] for epoch in epochs)]
    kinds = epochs[-1].get("kinds", [CLEAN] * len(epochs[-1]["weights"]))
    for kind, *weights in zip(kinds, *(epoch["weights"] for epoch in epochs), strict=True):
        colour = CORRUPTED if kind not in ("", CLEAN) else GOOD
        axes.plot(steps, [*begun, *(max(weight, LEAST) for weight in weights)], color=colour, alpha=0.35, linewidth=0.8)
    median = [*begun, *(max(epoch["weights_quantile/50"], LEAST) for epoch in epochs)]
    axes.plot(steps, median, color="black", label="median of the pool")
    if any(kind not in ("", CLEAN) for kind in kinds):
        axes.plot([], [], color=GOOD, label="clean rows")
        axes.plot([], [], color=CORRUPTED, label="corrupted rows")
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="weight", title=f"Weights of {len(kinds)} sampled rows")
    axes.legend(frameon=False, loc="lower left")
    return True


def _losses(figure: Figure | SubFigure, run: Path) -> bool:
    curves = read_curves(run, LOSSES)
    if not curves:
        return False
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    for name in LOSSES:
        if name in curves:
            axes.plot(*zip(*thin(curves[name]), strict=True), label=name.removesuffix("/loss"))
    axes.set(xlabel="step", ylabel="nats per token", title="Losses")
    axes.legend(frameon=False)
    return True


def _refinement(figure: Figure | SubFigure, run: Path) -> bool:
    responses = read_lines(run / "responses.jsonl")
    table = _table(run)
    if not responses or table is None:
        return False
    left, right = figure.subplots(1, 2)
    rounds = sorted({record["round"] for record in responses})
    values = [
        [r["logprob"] / max(1, len(r["token_ids"])) for r in responses if r["round"] == number] for number in rounds
    ]
    left.boxplot(values, tick_labels=[str(number) for number in rounds], showfliers=False)
    left.set(xlabel="round", ylabel="log-probability of a token", title="Generated answers")
    refined = table.filter(table["weight_refined"].is_valid())
    right.hist(
        [refined["weight"].to_numpy(), refined["weight_refined"].to_numpy()],
        30,
        label=["before: offline answer", "after: own answers"],
    )
    right.set(xlabel="weight", ylabel="rows", title=f"{len(refined):,} refined rows")
    right.legend(frameon=False)
    return True
