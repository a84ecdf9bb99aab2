"""A small data set out of a large one, by a rule that can be told: the first rows in file order that are short enough.

    python scripts/subset.py --pool pool.jsonl --validation validation.jsonl --test test.jsonl --truth truth.jsonl \\
        --rows 640 160 200 --characters 700 --output DIR

Prompt (with all turns before the answer) and response together have at most `--characters` characters. Records are
written as they are, to `pool.jsonl`, `validation.jsonl`, `test.jsonl` and, with `--truth`, `truth.jsonl`, which has the
lines of the chosen pool rows. Left out: drawing at random; files that are not shuffled should be shuffled first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lit_bilevel.comparison.results import replace_text
from lit_bilevel.data.files import records
from lit_bilevel.data.rows import Source
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

SETS = ("pool", "validation", "test")


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SETS:
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--truth", metavar="FILE")
    parser.add_argument("--rows", nargs=3, type=int, required=True, metavar=("POOL", "VALIDATION", "TEST"))
    parser.add_argument("--characters", type=int, required=True, help="most characters of prompt and response")
    parser.add_argument("--output", required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, count in zip(SETS, options.rows, strict=True):
            chosen = first_short(getattr(options, name), count, options.characters)
            lines = [record for i, (_, record) in enumerate(records(getattr(options, name))) if i in chosen]
            write(folder / f"{name}.jsonl", lines)
            if name == "pool" and options.truth:
                ids = set(chosen.values())
                write(folder / "truth.jsonl", [r for _, r in records(options.truth) if str(r["id"]) in ids])
    except UserError as error:
        sys.stderr.write(f"subset: {error}\n")
        return 2
    return 0


def first_short(path: str, count: int, characters: int) -> dict[int, str]:
    """Position and id of the first rows that are short enough."""
    chosen: dict[int, str] = {}
    for row in Source(path).read():
        if isinstance(row, Row) and length(row) <= characters:
            chosen[row.row] = row.id
            if len(chosen) == count:
                return chosen
    raise UserError(f"{path} has {len(chosen)} rows of at most {characters} characters and {count} are asked for.")


def length(row: Row) -> int:
    """Characters of all turns of a row."""
    return sum(len(text) for _, text in row.turns) + len(row.response)


def write(path: Path, lines: list[dict]) -> None:
    """Write records, one a line."""
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{len(lines):,} rows: {path}")


if __name__ == "__main__":
    sys.exit(main())
