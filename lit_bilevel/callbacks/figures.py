"""Figures of a finished fit, as PNG in `figures/` and in TensorBoard; they need matplotlib (`pip install .[figures]`).

    weights        distribution of the weights of each source
    trajectories   weights of sampled rows over the epochs
    losses         upper, lower and monitor loss over the steps
    refinement     log-probability of the generated answers, round by round, and the weights of refined rows

Drawn from the files of the run, so they show what is on disk. Left out: figures while a run goes; TensorBoard has
curves for that.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_bilevel.callbacks.export import is_rehearsal, run_folder
from lit_bilevel.callbacks.inspect import boards
from lit_bilevel.curves import read_curves, thinned
from lit_bilevel.inspection import read_lines

LOSSES = ("upper/loss", "lower/loss", "monitor/loss")


class Figures(Callback):
    """Draws the figures of a run at its end.

    Args:
        enabled: whether to draw them.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or is_rehearsal(trainer):
            return
        if importlib.util.find_spec("matplotlib") is None:
            rank_zero_info("no figures, since matplotlib is missing (install the extra `figures`)")
            return
        for logger in trainer.loggers:
            logger.save()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for name, figure in draw(run_folder(trainer)).items():
            for board in boards(trainer):
                board.experiment.add_figure(f"figures/{name}", figure, step)


def draw(run: Path) -> dict[str, Any]:
    """Draw all figures that a run folder has data for, and write them to `figures/`."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    folder = run / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, paint in (
        ("weights", _weights),
        ("trajectories", _trajectories),
        ("losses", _losses),
        ("refinement", _refinement),
    ):
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        if paint(figure, run):
            figure.savefig(folder / f"{name}.png")
            found[name] = figure
    return found


def _table(run: Path) -> Any:
    import pyarrow.parquet

    path = run / "weights.parquet"
    return pyarrow.parquet.read_table(path) if path.is_file() else None


def _weights(figure: Any, run: Path) -> bool:
    import numpy as np

    table = _table(run)
    if table is None:
        return False
    axes = figure.subplots()
    weights, sources = table["weight"].to_numpy(), np.array(table["source"].to_pylist())
    names, counts = np.unique(sources, return_counts=True)
    edges = np.linspace(0, np.quantile(weights, 0.995) or 1, 50)
    for name in names[np.argsort(-counts)][:8]:
        own = np.clip(weights[sources == name], 0, edges[-1])
        axes.hist(own, edges, histtype="step", density=True, label=f"{name or 'all rows'} ({len(own):,})")
    axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="weight (the highest 0.5 % in the last bin)", ylabel="density", title="Weights by source")
    axes.legend(frameon=False)
    return True


def _trajectories(figure: Any, run: Path) -> bool:
    epochs = read_lines(run / "inspection" / "epochs.jsonl")
    if not epochs:
        return False
    axes = figure.subplots()
    steps = [0, *(epoch["step"] for epoch in epochs)]
    for weights in zip(*(epoch["weights"] for epoch in epochs), strict=True):
        axes.plot(steps, [1, *weights], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(
        steps, [1, *(epoch["weights/quantile/50"] for epoch in epochs)], color="black", label="median of the pool"
    )
    axes.set(xlabel="step", ylabel="weight", title=f"Weights of {len(epochs[-1]['weights'])} sampled rows")
    axes.legend(frameon=False)
    return True


def _losses(figure: Any, run: Path) -> bool:
    curves = read_curves(run, LOSSES)
    if not curves:
        return False
    axes = figure.subplots()
    for name in LOSSES:
        if name in curves:
            axes.plot(*zip(*thinned(curves[name]), strict=True), label=name.removesuffix("/loss"))
    axes.set(xlabel="step", ylabel="nats per token", title="Losses")
    axes.legend(frameon=False)
    return True


def _refinement(figure: Any, run: Path) -> bool:
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
