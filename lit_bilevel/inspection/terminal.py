"""`lit-bilevel inspect RUN`: what a run found, on the terminal and as one HTML file that needs no network.

Read from the run folder alone: weights.parquet, inspection/, responses.jsonl, metrics.json, the event files. Whatever
is missing is left out of the report, so an unfinished run can be looked at. Left out: comparing runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.inspection.page import page
from lit_bilevel.inspection.refined import (
    ROUND_HEADER,
    TRUTH_HEADER,
    auroc_lines,
    counts_now,
    new_answers,
    round_lines,
    truth_lines,
)
from lit_bilevel.inspection.rounds import judge_rounds
from lit_bilevel.inspection.run import Report, read
from lit_bilevel.refinement.alike import Alike, SameAnswer, SameNumber, SharedWords

ALIKE: dict[str, type[Alike]] = {"answer": SameAnswer, "number": SameNumber, "words": SharedWords}
BLOCKS = " ▁▂▃▄▅▆▇█"


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="lit-bilevel inspect", description="Report what a run found.")
    parser.add_argument("run", help="the run folder (`trainer.default_root_dir`)")
    parser.add_argument("--output", help="the HTML file; by default inspect.html in the run folder")
    parser.add_argument("--rows", type=int, default=5, help="rows of each table on the terminal")
    parser.add_argument("--truth", help="jsonl of `id`, `corrupted`, `original_response`: were the new answers right?")
    parser.add_argument("--alike", choices=list(ALIKE), default="answer", help="what makes two answers the same")
    options = parser.parse_args(arguments[1:])
    try:
        report = read(Path(options.run))
        if options.truth:
            report.figures = judge_rounds(report.run, options.truth, ALIKE[options.alike]())
        output = Path(options.output) if options.output else report.run / "inspect.html"
        write_page(report, output)
    except UserError as error:
        sys.stderr.write(f"lit-bilevel inspect: {error}\n")
        return 2
    sys.stdout.write(f"{text(report, options.rows)}\n\nthe same with figures: {output}\n")
    return 0


def write_page(report: Report, output: Path) -> None:
    """Write the HTML file."""
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page(report), encoding="utf-8", errors="replace")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}); choose another place with `--output`.") from error


# ---- the terminal ----


def text(report: Report, rows: int = 5) -> str:
    """The report as plain text."""
    parts = [f"run {report.run}" + (f"\n{phase}" if (phase := report.phase()) else "")]
    if report.metrics:
        first = {name: f"  (before the run {value:.4f})" for name, value in report.first().items()}
        parts.append("\n".join(f"{name:<24}{v:.4f}{first.get(name, '')}" for name, v in report.metrics.items()))
    if report.weights:
        parts.append(_distribution(report))
    if len(report.sources()) > 1:
        lines = [f"{'source':<24}{'rows':>10}{'mean weight':>13}{'share':>8}"]
        lines += [f"{name[:23]:<24}{n:>10,}{mean:>13.3f}{share:>8.1%}" for name, n, mean, share in report.sources()]
        parts.append("\n".join(lines))
    for end in ("lowest", "highest"):
        found = [record for record in report.rows if record["end"] == end][:rows]
        if found:
            parts.append(f"{end} weights\n" + "\n".join(_row(record) for record in found))
    if report.rounds:
        parts.append("refinement\n" + columns(ROUND_HEADER, round_lines(report.rounds)))
    if report.figures:
        parts.append("right answers, by the truth file\n" + columns(TRUTH_HEADER, truth_lines(report.figures)))
        parts.append("AUROC of right new answers\n" + columns(*auroc_lines(report.figures)))
    for record in report.refinements[:rows]:
        new = " | ".join(short(answer, 90) for answer in new_answers(record))
        lines = [f"refined: {short(record['prompt'])}", f"  was: {short(record['response'])}", f"  new: {new}"]
        parts.append("\n".join([*lines, f"  counts now: {counts_now(record)}"]))
    return "\n\n".join(parts)


def _distribution(report: Report) -> str:
    weight = report.weights["weight"]
    top = float(np.quantile(weight, 0.99)) or 1.0
    counts, _ = np.histogram(np.minimum(weight, top), 60, (0, top))
    bars = "".join(BLOCKS[int(np.ceil(8 * count / counts.max()))] for count in counts)
    low, middle, high = np.quantile(weight, [0.05, 0.5, 0.95])
    return (
        f"weights of {len(weight):,} rows: 5 % below {low:.3g}, median {middle:.3g}, 5 % above {high:.3g},"
        f" highest {weight.max():.3g}; effective size {report.effective_share():.0%} of the pool\n"
        f"0 {bars} {top:.3g}+"
    )


def _row(record: dict[str, Any]) -> str:
    kind = f" [{record['kind']}]" if "kind" in record else ""
    return f"{record['weight']:>9.3g}  {record['id']}{kind}: {short(record['prompt'])} → {short(record['response'])}"


def columns(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lines of equal columns."""
    every = [header, *cells]
    wide = [max(len(line[place]) for line in every) for place in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, wide, strict=True)) for line in every)


def short(string: str, characters: int = 70) -> str:
    """One line without control characters, cut."""
    line = "".join(c if c.isprintable() else " " for c in string)
    return line if len(line) <= characters else line[: characters - 1] + "…"
