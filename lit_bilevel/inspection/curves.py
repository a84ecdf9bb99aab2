"""Reads scalar curves of a run back from its TensorBoard event files.

A resumed or repeated run writes a new file into the same folder: from its first step on, it replaces what older files
say. Left out: other kinds of records.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Curve = list[tuple[int, float]]


def read_curves(folder: Path, names: Sequence[str] | None = None) -> dict[str, Curve]:
    """Steps and values of the scalars of a run, by name; empty where there are no event files.

    Args:
        folder: the run folder.
        names: which scalars; by default all.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, Curve] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name.split(".")[3]):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            if names is None or name in names:
                new = [(event.step, event.value) for event in events.Scalars(name)]
                curves[name] = [point for point in curves.get(name, []) if point[0] < new[0][0]] + new
    return curves


def thin(curve: Curve, points: int = 400) -> Curve:
    """At most so many points, each the mean of its neighbours."""
    size = -(-len(curve) // points)
    parts = [curve[i : i + size] for i in range(0, len(curve), max(size, 1))]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
