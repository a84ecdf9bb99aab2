"""`lit-bilevel compare`: methods × seeds on the same data, model and policy steps, each at its monitor-best checkpoint.

    lit-bilevel compare --config configs/quickstart.yaml --methods mixing one_step --seeds 0 1 2 --output DIR

Runs what is missing, then writes the tables: a second call goes on where the first one stopped.

A run that fails stops no others. With `--jobs 2`, two runs at a time, each in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import sys
from pathlib import Path

from lit_bilevel.comparison import methods
from lit_bilevel.comparison.answers import write_pairs
from lit_bilevel.comparison.methods import runs_behind
from lit_bilevel.comparison.output import say
from lit_bilevel.comparison.results import Results
from lit_bilevel.comparison.run import Runner
from lit_bilevel.comparison.side_by_side import run_side_by_side
from lit_bilevel.comparison.table import draw, markdown
from lit_bilevel.comparison.variants import read_variants
from lit_bilevel.errors import UserError
from lit_bilevel.files import replace_text
from lit_bilevel.resources import locate


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    given = arguments[1:]
    options, shared = parser().parse_known_args(given)
    try:
        _compare(options, shared, given)
    except UserError as error:
        sys.stderr.write(f"lit-bilevel compare: {error}\n")
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command's own options."""
    own = argparse.ArgumentParser(
        prog="lit-bilevel compare",
        description="Compare methods on the same data, model and policy steps. Flags that are not listed"
        " (`--data.pool P`, `--model.policy.path M`, …) go to every run.",
        epilog=f"methods:\n{(methods.__doc__ or '').partition(chr(10))[2].partition('Left out')[0]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("--config", required=True, help="configuration that all methods share")
    own.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="listed below")
    own.add_argument("--seeds", nargs="+", type=int, default=[0])
    own.add_argument("--output", required=True, help="folder of the results and of the runs")
    own.add_argument("--jobs", type=int, default=1, metavar="J", help="runs at a time, each on its own threads or GPU")
    own.add_argument("--fresh", action="store_true", help="forget earlier results in the folder")
    own.add_argument("--subset", type=int, metavar="N", help="use N rows of the pool, stratified by source and kind")
    own.add_argument("--max_steps", type=int, metavar="M", help="policy steps of every run")
    own.add_argument("--keep", type=float, default=0.6, help="share of the pool that filters keep (0.6)")
    own.add_argument(
        *("--answers", "--exact_match"),
        action="store_true",
        help="also answer the test prompts: exact match, BLEU, ROUGE, and refusals where the test file says `expected`",
    )
    own.add_argument(
        *("--pairs",), nargs=2, metavar="METHOD", help="write the answers of two methods as pairs, for an outside judge"
    )
    own.add_argument("--variants", metavar="FILE", help="YAML of methods with settings and data of their own")
    own.add_argument("--keep_checkpoints", action="store_true", help="keep the checkpoints of finished runs")
    return own


def _compare(options: argparse.Namespace, shared: list[str], given: list[str]) -> None:
    variants = read_variants(options.variants) if options.variants else {}
    for name in (*options.methods, *(options.pairs or ())):
        methods.Method.parse(name, variants)
    options.config = locate(options.config)
    if not Path(options.config).is_file():
        raise UserError(f"{options.config} does not exist; check `--config`.")
    output = Path(options.output)
    if options.fresh:
        _forget(output)
    answers = options.answers or options.pairs is not None
    config = hashlib.sha256(Path(options.config).read_bytes()).hexdigest()
    settings = {name: getattr(options, name) for name in ("subset", "max_steps", "keep")}
    used = {f"variant {name}": repr(variants[name]) for name in variants}
    results = Results(output, {**settings, **used, "answers": answers, "config": config, "flags": shared})
    if options.jobs < 1:
        raise UserError(f"`--jobs` is {options.jobs}; it must be at least 1.")
    runner = Runner(
        options.config,
        shared,
        results,
        options.keep,
        options.subset,
        options.max_steps,
        answers,
        options.keep_checkpoints,
        variants,
        say,
    )
    failed = _fill(runner, options, shlex.join(["lit-bilevel", "compare", *given]))
    if options.pairs and not failed:
        seed, (first, second) = options.seeds[0], options.pairs
        folders = [results.run_folder(runner.row(name, seed).get("chosen", name), seed) for name in options.pairs]
        path = output / "pairs.jsonl"
        count = write_pairs(folders[0], folders[1], (first, second), path)
        say(f"{count:,} pairs of answers of {first} and {second}, seed {seed}: {path}")
    if failed:
        raise UserError(
            f"{len(failed)} of the runs failed: {', '.join(failed)}. The tables have the others; mend the causes, which"
            " are given above, and call the same command again: finished runs are kept."
        )


def _forget(output: Path) -> None:
    """Remove an earlier comparison, and nothing else.

    Raises:
        UserError: if there is something else.
    """
    if output.is_dir() and ((output / "comparison.json").is_file() or not any(output.iterdir())):
        shutil.rmtree(output)
    elif output.exists():
        raise UserError(
            f"`--fresh` removes earlier comparisons, and {output} is none (it has no comparison.json); give another"
            " `--output`, or remove it yourself."
        )


def _fill(runner: Runner, options: argparse.Namespace, command: str) -> list[str]:
    """Run what is missing and write the tables after each run; returns the runs that failed, which stop no others."""
    results, failed, table = runner.results, [], ""
    names = list(dict.fromkeys([*options.methods, *(options.pairs or ())]))
    broken = run_side_by_side(runner, names, options.seeds, options.jobs) if options.jobs > 1 else {}
    for number, (seed, name) in enumerate(((seed, name) for seed in options.seeds for name in names), start=1):
        known = results.find(name, seed) is not None
        say(f"[{number}/{len(names) * len(options.seeds)}] {name}, seed {seed}{': known' if known else ''}")
        try:
            if why := [broken[run, seed] for run in runs_behind(name, runner.variants) if (run, seed) in broken]:
                raise UserError("; ".join(why))
            runner.row(name, seed)
        except (Exception, SystemExit) as error:  # of any library: one method must not cost the night of the others
            if isinstance(error, SystemExit) and error.code != 2:  # 2: a refused setting; else a signal
                raise
            failed.append(f"{name} (seed {seed})")
            say(f"    failed: {type(error).__name__}: {error}")
            continue
        if not known or not table:
            table = markdown(results.rows, results.write_losses(), results.monitor_losses(), command)
            replace_text(results.folder / "results.md", table)
    if results.rows:
        say("\n" + table)
        drawn = draw(results.rows, results.folder / "results.png")
        files = f"results.csv, results.md, test_losses.parquet{', results.png' if drawn else ''}"
        say(f"written to {results.folder}: {files}")
        if not drawn:
            say("no figure, since matplotlib is missing (install the extra `figures`)")
    return failed
