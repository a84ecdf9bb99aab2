"""Reads everything that a run folder holds, for a report.

Whatever is missing is left empty, so an unfinished run can be looked at. Left out: how it is shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.inspection.curves import Curve, read_curves
from lit_bilevel.inspection.folder import Inspection, lines, read_lines
from lit_bilevel.inspection.rounds import RoundFigures
from lit_bilevel.scores.table import read_scores

Records = list[dict[str, Any]]


@dataclass
class Report:
    """What is known about a run.

    Args:
        run: the run folder.
        weights: columns of `weights.parquet`; empty where there is none.
        metrics: of `metrics.json`.
        settings: of `inspection/settings.json`.
        epochs: of `inspection/epochs.jsonl`.
        rows: rows at both ends of the weights, with their texts.
        refinements: questions with their offline answer and the generated ones, by round.
        rounds: of `inspection/rounds.jsonl`.
        figures: of the rounds against a truth file, where one was given.
        curves: scalars by name.
        scores: columns of `scores.parquet`, in the order of the weights; empty where there is none.
    """

    run: Path
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: Records = field(default_factory=list)
    rows: Records = field(default_factory=list)
    refinements: Records = field(default_factory=list)
    rounds: Records = field(default_factory=list)
    figures: list[RoundFigures] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def sources(self) -> list[tuple[str, int, float, float]]:
        """Name, rows, mean weight and share of all weight of every source, the heaviest first."""
        if not self.weights:
            return []
        names, number = np.unique(self.weights["source"], return_inverse=True)
        rows, mass = np.bincount(number), np.bincount(number, self.weights["weight"])
        lines = [
            (str(name) or "(no source)", int(count), float(weight / count), float(weight / max(mass.sum(), 1e-12)))
            for name, count, weight in zip(names, rows, mass, strict=True)
        ]
        return sorted(lines, key=lambda line: -line[2])

    def first(self) -> dict[str, float]:
        """The metrics as they were before the first step, where they were measured then."""
        points = {name: self.curves[name][0] for name in self.metrics if self.curves.get(name)}
        return {name: value for name, (step, value) in points.items() if step == 0}

    def phase(self) -> str:
        """The phase that the run was in when it last logged, of which and in words; empty where it has one only."""
        phases = str(self.settings.get("phases", "")).split("; ")
        curve = self.curves.get("phase")
        if len(phases) < 2 or not curve:
            return ""
        index = min(int(curve[-1][1]), len(phases) - 1)
        return f"phase {index + 1} of {len(phases)}, {phases[index]}"

    def effective_share(self) -> float:
        """(Σw)² / (N·Σw²)."""
        weight = self.weights["weight"]
        return float(weight.sum() ** 2 / max((weight**2).sum(), 1e-12) / len(weight))


def read(run: Path) -> Report:
    """Everything that a run folder holds.

    Raises:
        UserError: if it is no run folder.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give the `trainer.default_root_dir` of a run.")
    report = Report(run, curves=read_curves(run))
    table = run / "weights.parquet"
    if table.is_file():
        report.weights = _columns(table)
        report.scores = _scores(run / "scores.parquet", report.weights["id"].tolist())
    if (run / "metrics.json").is_file():
        report.metrics = json.loads((run / "metrics.json").read_text())
    if (run / "inspection" / "settings.json").is_file():
        report.settings = json.loads((run / "inspection" / "settings.json").read_text(encoding="utf-8"))
    report.epochs = read_lines(run / "inspection" / "epochs.jsonl")
    report.rows = read_lines(run / "inspection" / "rows.jsonl")
    report.refinements = _refinements(run, report.weights)
    report.rounds = Inspection(run / "inspection").rounds()
    if not (report.weights or report.epochs or report.curves):
        raise UserError(f"{run} holds no weights and no event files; give the `trainer.default_root_dir` of a run.")
    return report


def _columns(path: Path) -> dict[str, np.ndarray]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["id", "source", "weight", "weight_refined", "visits"])
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable table of weights ({error}).") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def _scores(path: Path, ids: list[str]) -> dict[str, np.ndarray]:
    """What a pass said of the rows that have a weight; NaN for those that it did not see."""
    if not path.is_file():
        return {}
    scores = read_scores(path)
    position = {key: number for number, key in enumerate(scores.ids)}
    rows = np.array([position.get(key, len(position)) for key in ids])
    return {name: np.append(values, np.nan)[rows] for name, values in scores.columns.items()}


def _refinements(run: Path, weights: dict[str, np.ndarray], limit: int = 20) -> Records:
    known = {
        record["row"]: record | {"rounds": {}} for record in read_lines(run / "inspection" / "refined.jsonl")[:limit]
    }
    if known:
        for record in lines(run / "responses.jsonl"):
            if record["row"] in known:
                known[record["row"]]["rounds"].setdefault(record["round"], []).append(record)
        if weights:
            groups = zip(weights["id"].tolist(), weights["weight_refined"].tolist(), strict=True)
            group = {key: weight for key, weight in groups if weight is not None and np.isfinite(weight)}
            for row in known.values():
                row |= {"weight_refined": group[row["id"]]} if row["id"] in group else {}
    return [record for record in known.values() if record["rounds"]]
