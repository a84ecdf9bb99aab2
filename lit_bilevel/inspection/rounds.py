"""Compares refinement rounds of a run with a truth file that has `original_response`: were the new answers right?

    old right    share of right offline answers among the rows that were answered anew; of those replaced
    new right    share of right new answers: of all, of those trained on; where all answers to a question agree, and not
    AUROC        of agreement, log-probability per token, and every response weight at the end of the round: probability
                 that a right answer has more than a wrong one

A new answer is right if it says what `original_response` says, an offline one if its row is not `corrupted`. The file
scores and never trains. Left out: what counts as saying the same in open text, beyond `SharedWords`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_bilevel.errors import UserError
from lit_bilevel.inspection.folder import Inspection, lines
from lit_bilevel.inspection.truth import aurocs
from lit_bilevel.refinement.alike import Alike

Records = list[dict[str, Any]]


@dataclass
class RoundFigures:
    """What a round looks like to one who knows the answers; shares are NaN of nothing.

    Args:
        round: its number.
        rows: answered anew.
        replaced: of them, those that train on new answers.
        old_right: share of right offline answers among `rows`.
        replaced_right: the same among those replaced.
        new_right: share of right answers among all new ones.
        used_right: the same among those trained on.
        agree_right: share among the answers to questions whose answers all agree.
        differ_right: share among the others.
        auroc: by what answers are ranked.
    """

    round: int
    rows: int
    replaced: int
    old_right: float
    replaced_right: float
    new_right: float
    used_right: float
    agree_right: float
    differ_right: float
    auroc: dict[str, float] = field(default_factory=dict)


def judge_rounds(run: Path, truth: str, alike: Alike) -> list[RoundFigures]:
    """Figures of every round of a run.

    Args:
        run: its folder.
        truth: a jsonl file of `id`, `corrupted` and `original_response`.
        alike: when two answers say the same.

    Raises:
        UserError: if the file is missing, or lacks what is needed of a row.
    """
    known = _answers(truth)
    rounds: dict[int, Records] = {}
    for record in lines(run / "responses.jsonl"):
        if record["id"] not in known:
            raise UserError(
                f"{truth} has no `original_response` of the row {record['id']!r}; give the truth of the pool of {run}."
            )
        original, clean = known[record["id"]]
        kept = {name: record[name] for name in ("row", "agreement", "used", "logprob")}
        kept |= {"length": len(record["token_ids"]), "clean": clean, "right": alike.same(record["response"], original)}
        rounds.setdefault(record["round"], []).append(kept)
    weighed: dict[int, Records] = {}
    for record in Inspection(run / "inspection").response_weights():
        weighed.setdefault(record["round"], []).append(record)
    return [_figures(number, answers, weighed.get(number, [])) for number, answers in sorted(rounds.items())]


def _figures(number: int, answers: Records, weighed: Records) -> RoundFigures:
    clean = {record["row"]: record["clean"] for record in answers}
    replaced = {record["row"] for record in answers if record["used"]}

    def right(chosen: Callable[[dict[str, Any]], bool]) -> float:
        return _mean(record["right"] for record in answers if chosen(record))

    columns = {
        "agreement": [(record["agreement"], record["right"]) for record in answers],
        "log-probability": [(r["logprob"] / max(1, r["length"]), r["right"]) for r in answers],
    }
    used: dict[int, list[bool]] = {}
    for record in answers:
        if record["used"]:
            used.setdefault(record["row"], []).append(record["right"])
    for record in weighed:
        for name, value in record["weights"].items():
            columns.setdefault(name, []).append((value, used[record["row"]][record["used"]]))
    return RoundFigures(
        round=number,
        rows=len(clean),
        replaced=len(replaced),
        old_right=_mean(clean.values()),
        replaced_right=_mean(value for row, value in clean.items() if row in replaced),
        new_right=right(lambda record: True),
        used_right=right(lambda record: record["used"]),
        agree_right=right(lambda record: record["agreement"] == 1),
        differ_right=right(lambda record: record["agreement"] < 1),
        auroc={name: value for name, pairs in columns.items() if (value := _auroc(pairs)) is not None},
    )


def _auroc(pairs: list[tuple[float, bool]]) -> float | None:
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    return aurocs(values, ["" if right else "wrong" for _, right in pairs]).get("all")


def _mean(values: Iterable[bool]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def _answers(truth: str) -> Mapping[str, tuple[str, bool]]:
    """Right answer of every row that has one on file, and whether its offline answer is right."""
    if not Path(truth).is_file():
        raise UserError(f"the truth file {truth} does not exist; check `--truth`.")
    answers = {}
    with Path(truth).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise UserError(f"{truth} line {number} is not JSON ({error}); it has one object a line.") from error
            if "original_response" in record and "id" in record:
                answers[str(record["id"])] = (str(record["original_response"]), not record.get("corrupted"))
    return answers
