"""The picture of the README: what went in, what the weights say, what was gained.

    python scripts/picture.py runs/quickstart_comparison [--method curate] [--seed 0] [--output .assets/overview.png]

It is drawn from a comparison on the embedded toy data with a truth file, which `scripts/quickstart.sh` leaves behind:
`weights.parquet` of the method's run, and the test losses of `results.csv`. Left out: other data, whose kinds of
corruption would need more room.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from matplotlib.figure import Figure

from lit_bilevel.inspection.page import COLOURS
from lit_bilevel.inspection.truth import read_truth

ROOT = Path(__file__).resolve().parents[1]
TRUTH = ROOT / "lit_bilevel" / "toy" / "truth.jsonl"
GOOD, BAD, GREY = COLOURS[0], COLOURS[1], "#9ca3af"
CLEAN = "clean"
NAMES = {
    "oracle": "clean rows alone\n(needs the truth)",
    "curate": "lit_bilevel",
    "one_step": "lit_bilevel",
    "mixing": "mixing both files",
    "validation_only": "trusted rows alone",
}
"""What a stranger calls a method."""


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="output folder of a comparison")
    parser.add_argument("--method", default="curate", help="whose weights are drawn")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--output", type=Path, default=ROOT / ".assets" / "overview.png")
    options = parser.parse_args()
    table = pyarrow.parquet.read_table(options.comparison / options.method / f"seed{options.seed}" / "weights.parquet")
    weight_N = table["weight"].to_numpy()
    kinds = np.array([kind or CLEAN for kind in read_truth(str(TRUTH), table["id"].to_pylist())])
    with (options.comparison / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == options.seed]
    losses = {row["method"]: float(row["test_loss"]) for row in rows}
    shown = ["validation_only", "mixing", options.method, "oracle"]
    figure = Figure(figsize=(11, 3.8), dpi=160, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(0.8, 1.35, 1.2))
    pool(left, kinds)
    weights(middle, weight_N, kinds)
    gain(right, {name: losses[name] for name in shown if name in losses}, options.method)
    figure.get_layout_engine().set(wspace=0.06)
    figure.savefig(options.output)


def ordered(kinds: np.ndarray) -> list[str]:
    """Clean first, then the kinds of corruption by name."""
    return [CLEAN, *sorted(set(kinds) - {CLEAN})]


def pool(axes: Any, kinds: np.ndarray) -> None:
    """One bar: the rows of the pool, good and bad."""
    bottom = 0
    for name in reversed(ordered(kinds)):
        rows = int((kinds == name).sum())
        axes.bar(0, rows, 0.7, bottom, color=GOOD if name == CLEAN else BAD, edgecolor="white", linewidth=1.5)
        axes.text(0, bottom + rows / 2, f"{name}  {rows:,}", color="white", ha="center", va="center", weight="bold")
        bottom += rows
    axes.set_title("1   An unclean pool", loc="left", weight="bold")
    axes.set_xlabel(f"{len(kinds):,} rows; nobody says\nwhich of them are bad")
    axes.set(xlim=(-0.45, 0.45), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def weights(axes: Any, weight_N: np.ndarray, kinds: np.ndarray) -> None:
    """The mean weight of each kind, with the middle half of its rows."""
    names = ordered(kinds)[::-1]
    for height, name in enumerate(names):
        own = weight_N[kinds == name]
        low, high = np.quantile(own, [0.25, 0.75])
        colour = GOOD if name == CLEAN else BAD
        axes.barh(height, own.mean(), 0.62, color=colour)
        axes.plot([low, high], [height, height], color="#111827", linewidth=1.4)
        axes.text(max(own.mean(), high), height, f"  {own.mean():.2f}", va="center", color="#111827")
    axes.axvline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title("2   One learned weight per row", loc="left", weight="bold")
    axes.set_xlabel("mean weight of each kind (line: the middle half)\ndashed: 1, as without weights")
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.14)
    bare(axes)


def gain(axes: Any, losses: dict[str, float], method: str) -> None:
    """Test losses; shorter is better."""
    for height, (name, loss) in enumerate(losses.items()):
        axes.barh(height, loss, 0.62, color=GOOD if name == method else GREY)
        axes.text(loss, height, f"  {loss:.2f}", va="center", weight="bold" if name == method else None)
    axes.set_title("3   A better policy", loc="left", weight="bold")
    axes.set_xlabel("loss on held-out rows\nshorter is better")
    axes.set_yticks(range(len(losses)), [NAMES[name] for name in losses])
    axes.margins(x=0.14)
    bare(axes)


def bare(axes: Any) -> None:
    """No frame and no marks."""
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xticks([])


if __name__ == "__main__":
    main()
