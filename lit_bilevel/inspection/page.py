"""Builds the HTML page of `lit-bilevel inspect`: one file, inline SVG, no script and no address of a network.

Every text from the data is escaped, and a Content-Security-Policy forbids loading anything. Left out: interaction;
TensorBoard has that.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lit_bilevel.inspection.curves import Curve, thin
from lit_bilevel.inspection.refined import (
    ROUND_HEADER,
    ROW_HEADER,
    TRUTH_HEADER,
    auroc_lines,
    round_lines,
    row_lines,
    truth_lines,
)
from lit_bilevel.inspection.run import Report
from lit_bilevel.inspection.text import arrow

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 250, 56, 36
CHARTS = (
    ("Losses (nats per token)", ("lower/loss", "upper/loss", "monitor/loss")),
    ("Effective size (rows)", ("weights/effective_size",)),
    ("Quantiles of the weights (%)", tuple(f"weights_quantile/{q}" for q in ("95", "75", "50", "25", "05"))),
    ("How well low weight finds corrupted rows (AUROC)", "auroc/"),
    ("Share of all weight, by source", "weights_share/"),
    ("Rank correlation of the weights with the epoch before", ("weights/rank_correlation",)),
)
TRUTH_TITLE = "Right answers, by the truth file"
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.5rem}figure{margin:0}figcaption{font-weight:600}
table{border-collapse:collapse;font-size:.9rem}
td,th{border-bottom:1px solid #8884;padding:.3rem .6rem;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.t{white-space:pre-wrap}.c{min-width:14rem;max-width:28rem;max-height:11rem;overflow:auto;overflow-wrap:anywhere}
.g{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1.5rem}.w{overflow-x:auto}
svg{width:100%;max-width:44rem;height:auto}svg text{fill:currentColor;font-size:12px}.m{opacity:.65}
.l span{white-space:nowrap;margin-right:.9rem}.l b{display:inline-block;width:1rem;height:.25rem;margin:0 .3rem .2rem 0}
"""


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{escape(report.run.name)} · lit-bilevel</title><style>{STYLE}</style></head><body>",
        f"<h1>Run {escape(report.run.name)}</h1>",
        *([f"<p>{escape(phase)}</p>"] if (phase := report.phase()) else []),
        *_results(report),
        *_settings(report),
        *_weights(report),
        *_scores(report),
        *_curves(report),
        *_ends(report),
        *_refinements(report),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def escape(text: object, characters: int = 1000) -> str:
    """Text that is only text, cut."""
    string = str(text)
    string = string if len(string) <= characters else string[:characters] + " …"
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "�" for c in string))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: Sequence[str] = ()) -> str:
    """A table; columns named in `texts` hold text, the others figures."""
    kinds = ["t" if name in texts else "n" for name in header]
    head = "".join(f"<th class={kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td class={k}>{_cell(cell)}</td>" for cell, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class=w><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(content: object) -> str:
    """Long texts scroll in a box, so that the next row stays in sight."""
    text = escape(content)
    return f"<div class=c>{text}</div>" if len(str(content)) > 40 else text


# ---- sections ----


def _results(report: Report) -> list[str]:
    if not report.metrics:
        return ["<p>The run has no test metrics (yet).</p>"]
    first = {name: f"{value:.4f}" for name, value in report.first().items()}
    rows = [(name, f"{value:.4f}", first.get(name, "")) for name, value in report.metrics.items()]
    return ["<h2>Results</h2>", table(("metric", "value", "before the run"), rows, ("metric",))]


def _settings(report: Report) -> list[str]:
    if not report.settings:
        return []
    listed = table(("setting", "value"), report.settings.items(), ("setting", "value"))
    return [f"<details><summary>Settings</summary>{listed}</details>"]


def _weights(report: Report) -> list[str]:
    if not report.weights:
        return []
    weight = report.weights["weight"]
    quantiles = np.quantile(weight, [0.05, 0.25, 0.5, 0.75, 0.95])
    words = ", ".join(f"{q} %: {value:.3g}" for q, value in zip((5, 25, 50, 75, 95), quantiles, strict=True))
    parts = [
        "<h2>Weights</h2>",
        f"<p>{len(weight):,} rows, mean weight {weight.mean():.3g}; quantiles {words}; highest {weight.max():.3g}."
        f" Effective size {report.effective_share():.0%} of the pool.</p>",
        bars(weight),
    ]
    sources = report.sources()
    if len(sources) > 1:
        rows = [(name, f"{n:,}", f"{mean:.3f}", f"{share:.1%}") for name, n, mean, share in sources]
        header = ("source", "rows", "mean weight", "share of all weight")
        parts += ["<h2>Sources</h2>", table(header, rows, ("source",))]
    return parts


def _scores(report: Report) -> list[str]:
    if not report.scores:
        return []
    from scipy.stats import rankdata  # slow to import, and most runs have no scores

    rows = []
    for name, values in report.scores.items():
        known = np.isfinite(values)
        if known.any():
            shown = [f"{value:.3g}" for value in np.quantile(values[known], [0.05, 0.5, 0.95])]
            a, b = rankdata(values[known]), rankdata(report.weights["weight"][known])
            varies = a.std() > 0 and b.std() > 0
            rows.append((name, f"{known.sum():,}", *shown, f"{np.corrcoef(a, b)[0, 1]:.2f}" if varies else ""))
    header = ("score", "rows", "5 %", "median", "95 %", "rank correlation with the weight")
    return ["<h2>Scores before training</h2>", table(header, rows, ("score",))]


def _curves(report: Report) -> list[str]:
    figures = []
    for title, wanted in CHARTS:
        names = [n for n in report.curves if n.startswith(wanted)] if isinstance(wanted, str) else wanted
        chosen = {_label(n): report.curves[n] for n in names if report.curves.get(n)}
        if chosen:
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{lines(chosen)}</figure>")
    for curve in [epoch["precision_recall"] for epoch in report.epochs if epoch.get("precision_recall")][-1:]:
        title = "Precision of calling the lowest weights corrupted"
        drawn = lines({"precision": curve}, "recall", (0, 1))
        figures.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
    return ["<h2>Curves</h2>", "<div class=g>", *figures, "</div>"] if figures else []


def _label(name: str) -> str:
    """What a legend calls a curve: `upper` for `upper/loss`, else what comes after the group."""
    group, _, rest = name.partition("/")
    return group if rest == "loss" else rest.replace("_", " ")


def _ends(report: Report) -> list[str]:
    parts = []
    truth = any("kind" in record for record in report.rows)
    header = [
        "weight",
        "epoch before",
        "places moved",
        "visits",
        "source",
        *(["truth"] if truth else []),
        "id",
        "prompt",
        "response",
    ]
    for end, title in (("lowest", "Lowest weights"), ("highest", "Highest weights")):
        rows = []
        for record in (record for record in report.rows if record["end"] == end):
            cells = [f"{record['weight']:.3g}", f"{record['before']:.3g}", arrow(record["moved"])]
            cells += [str(record["visits"]), record["source"]]
            cells += [record.get("kind", "")] if truth else []
            rows.append([*cells, record["id"], record["prompt"], record["response"]])
        if rows:
            texts = ("source", "truth", "id", "prompt", "response")
            parts += [f"<h2>{title}</h2>", table(header, rows, texts)]
    return parts


def _refinements(report: Report) -> list[str]:
    parts = []
    if report.rounds:
        parts.append(table(ROUND_HEADER, round_lines(report.rounds), ("outcome",)))
    if report.figures:
        parts += [f"<h2>{escape(TRUTH_TITLE)}</h2>", table(TRUTH_HEADER, truth_lines(report.figures))]
        parts += ["<h2>AUROC of right new answers</h2>", table(*auroc_lines(report.figures))]
    if report.refinements:
        parts += ["<h2>Rows that were answered anew</h2>", table(ROW_HEADER, row_lines(report.refinements), ROW_HEADER)]
    return ["<h2>Refinement</h2>", *parts] if parts else []


# ---- drawing ----


def bars(weight: np.ndarray) -> str:
    """A histogram; the highest 1 % are in the last bar."""
    top = float(np.quantile(weight, 0.99)) or 1.0
    counts, _ = np.histogram(np.minimum(weight, top), 60, (0, top))
    wide, high = (WIDTH - LEFT) / 60, HEIGHT - BOTTOM - 10
    across, up = (0.0, top), (0.0, float(counts.max()))
    drawn = "".join(
        f"<rect x={LEFT + i * wide:.1f} y={10 + high * (1 - n / counts.max()):.1f} width={wide - 1:.1f}"
        f" height={high * n / counts.max():.1f} fill='{COLOURS[0]}'/>"
        for i, n in enumerate(counts)
    )
    return _frame(drawn, across, up, "weight (the highest 1 % in the last bar); up: rows")


def lines(curves: dict[str, Curve], below: str = "step", up: tuple[float, float] | None = None) -> str:
    """Curves with a legend, from 0 to their last point.

    Args:
        curves: points by name.
        below: what the points go over.
        up: the range upwards; by default that of the values.
    """
    points = {name: thin([p for p in curve if np.isfinite(p[1])]) for name, curve in curves.items()}
    points = {name: curve for name, curve in points.items() if curve}
    if not points:
        return "<p class=m>no finite values</p>"
    values = [value for curve in points.values() for _, value in curve]
    last = max(curve[-1][0] for curve in points.values()) or 1
    low, high = up or (min(values), max(values))
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    drawn = ""
    for i, curve in enumerate(points.values()):
        colour = COLOURS[i % len(COLOURS)]
        pixels = [(_x(step, last), _y(value, low, high)) for step, value in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        drawn += f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=1.6 />"
        drawn += "".join(
            f"<circle cx={x:.1f} cy={y:.1f} r=2.5 fill='{colour}'/>" for x, y in pixels[: 1 if len(pixels) == 1 else 0]
        )
    legend = " ".join(
        f"<span><b style='background:{COLOURS[i % len(COLOURS)]}'></b>{escape(name)}</span>"
        for i, name in enumerate(points)
    )
    return _frame(drawn, (0, last), (low, high), below) + (f"<div class=l>{legend}</div>" if len(points) > 1 else "")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, as many as fit."""
    unit = 10 ** math.floor(math.log10((high - low) / most))
    step = next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def figure(value: float) -> str:
    """A number as an axis shows it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _x(step: float, last: float) -> float:
    return LEFT + step / last * (WIDTH - LEFT - 6)


def _y(value: float, low: float, high: float) -> float:
    return 10 + (high - value) / (high - low) * (HEIGHT - BOTTOM - 10)


def _frame(drawn: str, across: tuple[float, float], up: tuple[float, float], below: str) -> str:
    base = HEIGHT - BOTTOM
    marks = "".join(
        f"<line x1={LEFT} x2={WIDTH} y1={_y(v, *up):.1f} y2={_y(v, *up):.1f} stroke='currentColor' opacity=.15 />"
        f"<text x={LEFT - 6} y={_y(v, *up) + 4:.1f} text-anchor=end>{figure(v)}</text>"
        for v in ticks(*up)
    )
    marks += "".join(
        f"<text x={_x(v, across[1]):.1f} y={base + 14} text-anchor=middle>{figure(v)}</text>" for v in ticks(*across)
    )
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{escape(below)}'>{marks}{drawn}"
        f"<text x={(WIDTH + LEFT) / 2} y={HEIGHT - 5} text-anchor=middle class=m>{escape(below)}</text></svg>"
    )
