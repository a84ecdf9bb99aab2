"""`lit-bilevel select`: writes the rows of a pool with the highest learned weights, or scores, as a new file.

    --keep f | --top_k K      the highest weights; equal weights at the cut are drawn, not taken by position
    --threshold T             w_i ≥ T (the mean weight is 1)
    --sample K                K rows without replacement, in proportion to w: the largest log w_i + Gumbel noise
                              (Efraimidis and Spirakis, 2006)
    --by combined             a score from `lit-bilevel score` in place of the weight; where low values speak for a row
                              (`scores/columns.py` says), the lowest are kept, and with --threshold those up to T

Rows are joined by `id` (the row number where the pool has none), keep the order of the source and every field: lines
of a jsonl file are copied byte for byte, a parquet table keeps its schema. Only numpy and pyarrow are imported (for
folders and hub ids also datasets), so the command starts at once.

Left out: refined responses; they are in `responses.jsonl` and are no rows of the pool.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_bilevel.commands.originals import read_pool
from lit_bilevel.commands.weighted import DRAWABLE, Joined, join, read_weights
from lit_bilevel.errors import UserError
from lit_bilevel.files import replacing
from lit_bilevel.scores.columns import DIRECTION

MODES = ("keep", "top_k", "threshold", "sample")


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    try:
        _run(parser().parse_args(arguments[1:]))
    except UserError as error:
        sys.stderr.write(f"lit-bilevel select: {error}\n")
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # type: ignore[override]
        raise UserError(f"{message} (`lit-bilevel select --help` lists the options)")


def parser() -> argparse.ArgumentParser:
    """Of the command's options."""
    own = _Parser(prog="lit-bilevel select", description="Keep the best-weighted rows of a pool, as a new file.")
    own.add_argument(
        *("--weights",),
        required=True,
        metavar="RUN/weights.parquet",
        help="weights of a finished run, or a file of scores",
    )
    own.add_argument("--by", default="weight", metavar="COLUMN", help="column of that file (weight), such as combined")
    own.add_argument(
        "--pool", required=True, nargs="+", help="the pool they were learned on: one or several files, folders, hub ids"
    )
    own.add_argument("--output", required=True, help="the new file, .jsonl, .csv or .parquet")
    mode = own.add_mutually_exclusive_group(required=True)
    mode.add_argument("--keep", type=float, metavar="SHARE", help="the top share of the rows, such as 0.8")
    mode.add_argument("--top_k", type=int, metavar="K", help="the K rows that weigh most")
    mode.add_argument("--threshold", type=float, metavar="T", help="rows that weigh at least T; the mean weight is 1")
    mode.add_argument("--sample", type=int, metavar="K", help="K rows drawn by weight, without replacement")
    own.add_argument("--seed", type=int, default=0, help="of --sample, and of the draw among equal weights")
    own.add_argument(
        "--balance",
        nargs="?",
        const="share",
        choices=("share", "equal"),
        help="rank rows inside their source: each keeps the same share (default), or as many rows as the others"
        " (`equal`); with --threshold, T is relative to the mean weight of the source",
    )
    own.add_argument("--with_weights", action="store_true", help="add the weight to every row")
    own.add_argument("--weight_column", default="weight", help="name of the added column")
    own.add_argument("--id_column", default="id", help="the pool's column that holds the ids")
    return own


def _run(options: argparse.Namespace) -> None:
    _check(options)
    weights = read_weights(options.weights, options.by)
    pool = read_pool(options.pool, options.id_column)
    joined = join(pool, weights, options)
    chosen = choose(joined, options)
    if not chosen.any():
        best = joined.weight_n.max() if joined.sign > 0 else joined.weight_n.min()
        end = "highest" if joined.sign > 0 else "lowest"
        raise UserError(
            f"no row is left: `--threshold` is {options.threshold:g} and the {end} {options.by} is {best:.4g}."
        )
    mask = np.zeros(len(pool.ids), dtype=bool)
    mask[joined.position_n[chosen]] = True
    added = None
    if options.with_weights:
        if options.weight_column in pool.columns():
            raise UserError(f"the pool has a column {options.weight_column!r} already; set `--weight_column`.")
        added = (options.weight_column, joined.weight_n[chosen])
    path = Path(options.output)
    with replacing(path) as partial:
        pool.write(partial, mask, added, path.suffix)
    sys.stdout.write(_report(joined, chosen, options.output, options.by))


def _check(options: argparse.Namespace) -> None:
    if options.keep is not None and not 0 < options.keep <= 1:
        raise UserError(f"`--keep` is {options.keep:g}; it must be above 0 and at most 1.")
    for name in ("top_k", "sample"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"`--{name}` is {value}; it must be at least 1.")
    if options.sample is not None and options.by not in DRAWABLE:
        raise UserError(f"`--sample` draws by a weight, and `{options.by}` is none; use `--keep` or `--top_k`.")
    if options.balance and options.by in DIRECTION and options.by != "weight":
        raise UserError("`--balance` needs the sources of a run's weights, which a file of scores does not have.")
    if options.balance == "equal" and options.threshold is not None:
        raise UserError("`--balance equal` fixes how many rows are kept and `--threshold` does not; use `--top_k`.")
    output = Path(options.output)
    if output.suffix not in (".jsonl", ".csv", ".parquet"):
        raise UserError(f"`--output` is {options.output!r}; its name must end in .jsonl, .csv or .parquet.")
    for name, other in (("weights", Path(options.weights)), *(("pool", Path(path)) for path in options.pool)):
        if output.exists() and other.exists() and output.samefile(other):
            raise UserError(f"`--output` is the file of `--{name}`; give another name.")
    if output.is_dir():
        raise UserError(f"`--output` {options.output} is a folder; give the name of a file.")


# ---- the choice ----


def choose(joined: Joined, options: argparse.Namespace) -> np.ndarray:
    """[n] which rows are kept."""
    weight, group = joined.sign * joined.weight_n, joined.source_n
    if options.threshold is not None:
        if options.balance:
            rows = np.bincount(group, minlength=len(joined.sources))
            mean = np.bincount(group, weight, len(joined.sources)) / np.maximum(rows, 1)
            return weight >= options.threshold * mean[group]
        return weight >= joined.sign * options.threshold
    random = np.random.default_rng(options.seed)
    if options.sample is not None:
        with np.errstate(divide="ignore"):
            key = np.log(weight) + random.gumbel(size=len(weight))
        possible = weight > 0
    else:
        key, possible = weight, np.ones(len(weight), dtype=bool)
    wanted = options.sample or options.top_k or max(1, round(options.keep * len(weight)))
    if not options.balance:
        group = np.zeros_like(group)
    available = np.bincount(group[possible], minlength=len(joined.sources))
    if wanted > available.sum():
        what = "rows that weigh more than 0" if options.sample else "rows with a weight"
        raise UserError(f"{wanted:,} rows are wanted and there are {available.sum():,} {what}; ask for fewer.")
    rows = np.bincount(group, minlength=len(joined.sources))
    shares = (rows > 0).astype(float) if options.balance == "equal" else rows
    counts = apportion(wanted, shares, available)
    order = np.lexsort((random.random(len(key)), -key, group))  # by group, then key; equal keys in random order
    first = np.concatenate([[0], rows.cumsum()[:-1]])
    rank = np.empty(len(key), dtype=np.int64)
    rank[order] = np.arange(len(key)) - first[group[order]]
    return rank < counts[group]


def apportion(wanted: int, shares: Sequence[float] | np.ndarray, available: np.ndarray) -> np.ndarray:
    """Split `wanted` by shares, no group above what it has; fractions go to the largest remainders.

    Args:
        wanted: the sum of the result, at most that of `available`.
        shares: [S] the ideal proportions.
        available: [S] the most that each group can give.
    """
    shares = np.asarray(shares, dtype=float)
    counts = np.zeros(len(shares), dtype=np.int64)
    while counts.sum() < wanted:  # again only where a group gave all that it has
        left = wanted - counts.sum()
        ideal = np.where(counts < available, shares, 0)
        ideal *= left / ideal.sum()
        step = np.floor(ideal).astype(np.int64)
        step[np.argsort(step - ideal, kind="stable")[: left - step.sum()]] += 1
        counts += np.minimum(step, available - counts)
    return counts


# ---- what is said ----


def _report(joined: Joined, chosen: np.ndarray, output: str, by: str) -> str:
    lines = [("source", "kept", "of", "share", f"mean {by} kept")]
    count = len(joined.sources)
    rows = np.bincount(joined.source_n, minlength=count)
    kept = np.bincount(joined.source_n[chosen], minlength=count)
    mass = np.bincount(joined.source_n[chosen], joined.weight_n[chosen], count)
    parts = list(zip(joined.sources, rows, kept, mass, strict=True))
    if count > 1:
        parts.append(("all", rows.sum(), kept.sum(), mass.sum()))
    for name, total, number, weight in parts:
        mean = f"{weight / number:.3f}" if number else "-"
        lines.append((name or "(no source)", f"{number:,}", f"{total:,}", f"{number / max(total, 1):.1%}", mean))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ""
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text += "  ".join(cells) + "\n"
    return f"{text}written to {output}\n"
