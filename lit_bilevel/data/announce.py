"""Tells the user about the data: `skipped.jsonl` and a summary of the sets at the start.

Left out: statistics of the texts.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_bilevel.data.table import column, is_paired
from lit_bilevel.files import replace_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MOST = 20
"""Files that are named one by one."""
DIM, NORMAL = "\x1b[2m", "\x1b[0m"


def announce(
    sets: Mapping[str, Dataset],
    skipped: Mapping[str, Sequence[str]],
    formats: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Log the summary, and the first row of the pool as the policy sees it."""
    rank_zero_info(summary(sets, skipped, formats))
    if sys.stderr.isatty():
        rank_zero_info(f"the first row, dimmed where it is not learned:\n{show_row(tokenizer, sets['pool'])}")
    else:
        rank_zero_info(
            f"the first row, in brackets where it is not learned:\n{show_row(tokenizer, sets['pool'], '[]')}"
        )


@rank_zero_only
def write_skipped(folder: Path, skipped: Mapping[str, Sequence[str]]) -> None:
    """`skipped.jsonl`, one object (`set`, `problem`) for every row left out; no file where there is none."""
    path = folder / "skipped.jsonl"
    records = [{"set": name, "problem": problem} for name, problems in skipped.items() for problem in problems]
    if not records:
        path.unlink(missing_ok=True)
        return
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def notices(table: Dataset) -> dict[str, tuple[int, str]]:
    """In what rows are rendered otherwise than they say: the kind → how many rows, and place and text of the first."""
    kinds: dict[str, tuple[int, str]] = {}
    texts = column(table, "notice")
    for position in range(len(texts)) if texts.null_count < len(texts) else ():
        text = texts[position].as_py()
        if text is not None:
            kind = text.partition(":")[0]
            count, first = kinds.get(kind, (0, f"{table[position]['place']}{text.removeprefix(kind)}"))
            kinds[kind] = (count + 1, first)
    return kinds


def tell(name: str, unread: Sequence[str], kinds: Mapping[str, tuple[int, str]]) -> None:
    """Say once which fields of a set are not read, and in what its rows are rendered otherwise than they say."""
    if unread:
        rank_zero_info(f"{name}: fields that are not read: {', '.join(unread)}")
    for kind, (count, first) in kinds.items():
        text = f"{name}: {kind} of {count:,} rows (the first: {first})"
        if "answer" in kind:
            remedy = "give the tokenizer a template that keeps it, or put thoughts into the field `reasoning_content`"
            rank_zero_warn(f"{text}; that is what would be learned. If it is not meant, {remedy}.")
        else:
            rank_zero_info(text)


def summary(sets: Mapping[str, Dataset], skipped: Mapping[str, Sequence[str]], formats: Mapping[str, str]) -> str:
    """Formats of the files; rows, longest sequence, truncated and skipped rows of each set."""
    import pyarrow.compute

    lines = [f"{path}: format {name}" for path, name in itertools.islice(formats.items(), MOST)]
    if len(formats) > MOST:
        lines.append(f"and {len(formats) - MOST} more files: {', '.join(sorted(set(formats.values())))}")
    for name, table in sets.items():
        longest = pyarrow.compute.max(column(table, "length")).as_py()
        truncated = pyarrow.compute.sum(column(table, "truncated")).as_py()
        pairs = "preference pairs, " if is_paired(table) else ""
        lines.append(f"{name}: {len(table):,} rows, {pairs}longest {longest:,} tokens, {truncated:,} truncated")
    lines += [f"{name}: {len(problems)} rows skipped" for name, problems in skipped.items() if problems]
    return "\n".join(lines)


def show_row(
    tokenizer: PreTrainedTokenizerBase, table: Dataset, marks: Sequence[str] = (DIM, NORMAL), row: int = 0
) -> str:
    """A row as the policy sees it, the tokens that are not learned between two marks."""
    record = table[row]
    ids, start = record["input_ids"], record["response_start"]
    learned = {*record["earlier"], *range(start, len(ids))}
    pieces: list[tuple[bool, list[int]]] = []
    for position, token in enumerate(ids):
        if not pieces or pieces[-1][0] != (position in learned):
            pieces.append((position in learned, []))
        pieces[-1][1].append(token)
    texts = [(known, _printable(cast("str", tokenizer.decode(part)))) for known, part in pieces]
    return "".join(text if known else f"{marks[0]}{text}{marks[1]}" for known, text in texts)


def _printable(text: str) -> str:
    """Text without control characters, so that data cannot steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
