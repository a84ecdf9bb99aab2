"""`lit-bilevel inspect RUN`: reports a run, on the terminal and as one HTML file that needs no network.

Read from the run folder alone: weights.parquet, inspection/, responses.jsonl, metrics.json, the event files. Whatever
is missing is left out of the report, so an unfinished run can be looked at. Left out: comparing runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_bilevel.errors import UserError
from lit_bilevel.files import replace_text
from lit_bilevel.inspection.page import page
from lit_bilevel.inspection.rounds import judge_rounds
from lit_bilevel.inspection.run import Report, read
from lit_bilevel.inspection.terminal import text
from lit_bilevel.refinement.alike import Alike, SameAnswer, SameNumber, SharedWords

ALIKE: dict[str, type[Alike]] = {"answer": SameAnswer, "number": SameNumber, "words": SharedWords}


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    options = parser().parse_args(arguments[1:])
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


def parser() -> argparse.ArgumentParser:
    """Of the command's own options."""
    own = argparse.ArgumentParser(prog="lit-bilevel inspect", description="Report what a run found.")
    own.add_argument("run", help="the run folder (`trainer.default_root_dir`)")
    own.add_argument("--output", help="the HTML file; by default inspect.html in the run folder")
    own.add_argument("--rows", type=int, default=5, help="rows of each table on the terminal")
    own.add_argument("--truth", help="jsonl of `id`, `corrupted`, `original_response`: were the new answers right?")
    own.add_argument("--alike", choices=list(ALIKE), default="answer", help="what makes two answers the same")
    return own


def write_page(report: Report, output: Path) -> None:
    """Write the HTML file."""
    try:
        replace_text(output, page(report))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}); choose another place with `--output`.") from error
