"""The report of a run as plain text, for a terminal.

Left out: curves and settings; the HTML page has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_bilevel.inspection.refined import (
    ROUND_HEADER,
    TRUTH_HEADER,
    auroc_lines,
    counts_now,
    new_answers,
    round_lines,
    truth_lines,
)
from lit_bilevel.inspection.run import Report
from lit_bilevel.inspection.text import short

BLOCKS = " ▁▂▃▄▅▆▇█"


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
        shown = [record for record in report.rows if record["end"] == end][:rows]
        if shown:
            parts.append(f"{end} weights\n" + "\n".join(_row(record) for record in shown))
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
    wide = [max(len(line[column]) for line in every) for column in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, wide, strict=True)) for line in every)
