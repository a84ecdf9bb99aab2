"""Comparisons on the small data, and their tables."""

from __future__ import annotations

import csv

from lit_bilevel.comparison.command import main


def compare(small, output, *more):
    paths = [f"--data.{name}={path}" for name, path in small.items()]
    settings = [
        "--data.batch_size=8",
        "--trainer.log_every_n_steps=1",
        "--figures.enabled=false",
        "--model.max_new_tokens=2",
        "--max_steps=2",
    ]
    return main(["compare", "--config=configs/quickstart.yaml", "--output", str(output), *paths, *settings, *more])


def table_of(output):
    with (output / "results.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


class Killed(BaseException):
    """Stands for whatever ends a process."""
