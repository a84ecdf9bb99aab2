"""Writes `results.md` and `results.png`: every method beside mixing and the oracle.

    gap closed     (mixing − method) / (mixing − oracle), of mean test losses
    Δ mixing       mean over test rows of the paired difference to mixing, losses averaged over seeds, and its p

Both over the seeds that all of the methods in question have, or a luckier seed would look like a better method.
Left out: ranking by anything but the test loss.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lit_bilevel.comparison.choice import in_words
from lit_bilevel.comparison.results import Losses, Result
from lit_bilevel.comparison.significance import interval, permutation_test

HIDDEN = ("method", "seed", "chosen", "steps", "seconds")


def markdown(rows: Sequence[Result], losses: Losses, monitor: Losses, command: str) -> str:
    """The table, best test loss first, and how it came about.

    Args:
        rows: all results.
        losses: of the test rows, by method and seed.
        monitor: of the monitor rows, where they are known.
        command: what made it.
    """
    methods = by_method(rows)
    mean = {name: interval(values(part, "test_loss"))[0] for name, part in methods.items()}
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in HIDDEN]
    names.sort(key=lambda name: (name != "test_loss", name.startswith("auroc/")))

    def measured(name: str) -> Callable[[str], str]:
        return lambda method: cell(methods[method], name)

    shown: list[tuple[str, Callable[[str], str]]] = [(name, measured(name)) for name in names]
    if "mixing" in methods:
        extra = [("Δ mixing (p)", lambda method: difference(method, losses))]
        if "oracle" in methods:
            extra.append(("gap closed", lambda method: share_of_gap(method, losses)))
        shown[1:1] = extra
        shown.append(("time / mixing", lambda method: slower(methods[method], methods["mixing"])))
    if len({row["steps"] for row in rows}) > 1:
        shown.append(("steps", lambda method: f"{interval(values(methods[method], 'steps'))[0]:.0f}"))
    shown.append(("seconds", lambda method: cell(methods[method], "seconds")))
    shown.append(("seeds", lambda method: str(len(methods[method]))))
    lines = ["| method | " + " | ".join(title for title, _ in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for method in sorted(methods, key=lambda name: mean[name]):
        lines.append(f"| {method} | " + " | ".join(make(method) for _, make in shown) + " |")
    return "\n".join([*lines, "", *notes(rows, losses, monitor, command)]) + "\n"


def notes(rows: Sequence[Result], losses: Losses, monitor: Losses, command: str) -> list[str]:
    """What the table has to say about itself."""
    import torch

    count = len(next(iter(next(iter(losses.values())).values())))
    chosen = sorted({f"{row['method']}: {row['chosen']} (seed {row['seed']})" for row in rows if "chosen" in row})
    seeds = sorted({row["seed"] for row in rows})
    steps = {row["steps"] for row in rows}
    many = f" {int(max(steps)):,} policy steps a run, each" if len(steps) == 1 else " each run"
    lines = [
        f"Mean ± half of the 95 % interval over seeds {', '.join(map(str, seeds))} (none for a single seed); {count:,}"
        f" test rows;{many} at the checkpoint that its monitor loss chose. Δ mixing: mean paired difference over the"
        " test rows, losses averaged over the seeds that both have, and p of a permutation test over rows, which says"
        " nothing of other seeds. Seconds include the runs a method needs.",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}.",
        f"`{command}`",
    ]
    by_choice = [f"Chosen by monitor loss: {'; '.join(chosen)}."] if chosen else []
    # the oracle is no choice that a user has
    text = in_words(monitor, [name for name in monitor if name != "oracle"])
    return [*by_choice, *([text] if text else []), *lines]


def average(methods: Sequence[str], losses: Losses) -> list[np.ndarray]:
    """[n] losses of each method, averaged over the seeds that all of them have; nothing where there is none."""
    seeds = sorted(set.intersection(*(set(losses[method]) for method in methods)))
    return [np.mean([losses[method][seed] for seed in seeds], axis=0) for method in methods] if seeds else []


def difference(method: str, losses: Losses) -> str:
    """Paired difference to mixing, with its p."""
    pair = average([method, "mixing"], losses)
    if method == "mixing" or not pair:
        return "0" if pair else "–"
    difference_n = pair[0] - pair[1]
    p = permutation_test(difference_n)
    return f"{difference_n.mean():+.4f} ({'<0.001' if p < 0.001 else f'{p:.3f}'})"


def share_of_gap(method: str, losses: Losses) -> str:
    """Share of the gap between mixing and the oracle; a dash where there is none."""
    means = [loss_n.mean() for loss_n in average([method, "mixing", "oracle"], losses)]
    if not means or means[1] <= means[2]:
        return "–"
    return f"{(means[1] - means[0]) / (means[1] - means[2]):.2f}"


def slower(rows: Sequence[Result], others: Sequence[Result]) -> str:
    """The time of some runs over that of others, over the seeds that both have."""
    mine, theirs = ({row["seed"]: row["seconds"] for row in part} for part in (rows, others))
    seeds = mine.keys() & theirs.keys()
    return f"{sum(mine[seed] for seed in seeds) / sum(theirs[seed] for seed in seeds):.2f}" if seeds else "–"


def by_method(rows: Sequence[Result]) -> dict[str, list[Result]]:
    """The rows of each method."""
    return {name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}


def values(rows: Sequence[Result], measure: str) -> list[float]:
    """A measure of the rows that have it."""
    return [float(row[measure]) for row in rows if measure in row]


def cell(rows: Sequence[Result], measure: str) -> str:
    """A table cell."""
    mean, half = interval(values(rows, measure))
    digits = 0 if measure == "seconds" else 4 if "loss" in measure else 3
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def processor() -> str:
    """The processor, by its trade name."""
    path = Path("/proc/cpuinfo")
    models = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.is_file() else []
    return f"{models[0].partition(': ')[2] if models else platform.machine()} ({os.cpu_count()} cores)"


def draw(rows: Sequence[Result], path: Path) -> bool:
    """Draw the test losses with their intervals; returns whether matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    methods = by_method(rows)
    intervals = {name: interval(values(part, "test_loss")) for name, part in methods.items()}
    order = sorted(intervals, key=lambda name: -intervals[name][0])
    figure = Figure(figsize=(7, 1 + 0.3 * len(order)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(order):
        mean, half = intervals[name]
        axes.errorbar(mean, height, xerr=None if math.isnan(half) else half, fmt="o", color="tab:blue", capsize=3)
        seen = values(methods[name], "test_loss")
        axes.plot(seen, [height] * len(seen), ".", color="0.6", zorder=0)
    for name in {"mixing", "oracle"} & intervals.keys():
        axes.axvline(intervals[name][0], color="0.8", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="test loss (nats a token, mean over rows)")
    figure.savefig(path)
    return True
