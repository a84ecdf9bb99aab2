"""Shows refinement on the page and on the terminal: what each round came to, and rows to judge at a glance.

A row of the table is a question with its old answer, the new ones of the last round (how often, agreement,
log-probability per token), and what counts now. Left out: all rows; `responses.jsonl` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_bilevel.inspection.rounds import RoundFigures

Lines = list[list[str]]

ROUND_HEADER = ("round", "step", "rows", "used", "new right", "old right", "outcome", "tokens/s", "share of time")
ROW_HEADER = ("id", "question", "old answer", "new answers", "counts now")
TRUTH_HEADER = ("round", "rows", "replaced", "old right", "… replaced", "new right", "… used", "… agree", "… differ")


def round_lines(rounds: Sequence[dict[str, Any]]) -> Lines:
    """What each round came to, as cells under `ROUND_HEADER`; shares of right answers are the run's own estimates."""
    lines = []
    for record in rounds:
        verdict = record["verdict"]
        judged = [f"{verdict[name]:.0%}" if verdict else "" for name in ("new_right", "old_right")]
        outcome = "not judged" if not verdict else "left out" if verdict["least"] is None else "trusted"
        if verdict and verdict["least"]:
            outcome += f" from an agreement of {verdict['least']:.0%} on"
        cost = [f"{record['tokens_per_second']:.0f}", f"{record['share_of_time']:.0%}"]
        counts = [str(record["round"]), str(record["step"]), f"{record['rows']:.0f}", f"{record['used']:.0%}"]
        lines.append([*counts, *judged, outcome, *cost])
    return lines


def truth_lines(figures: Sequence[RoundFigures]) -> Lines:
    """The same against the truth, under `TRUTH_HEADER`."""
    return [
        [str(f.round), str(f.rows), str(f.replaced)]
        + [
            _percent(v)
            for v in (f.old_right, f.replaced_right, f.new_right, f.used_right, f.agree_right, f.differ_right)
        ]
        for f in figures
    ]


def auroc_lines(figures: Sequence[RoundFigures]) -> tuple[list[str], Lines]:
    """Header and cells of the AUROC of everything that answers are ranked by."""
    names = list(dict.fromkeys(name for f in figures for name in f.auroc))
    cells = [[str(f.round), *(f"{f.auroc[n]:.3f}" if n in f.auroc else "" for n in names)] for f in figures]
    return ["round", *names], cells


def row_lines(refinements: Sequence[dict[str, Any]]) -> Lines:
    """Rows under `ROW_HEADER`, in their last round."""
    lines = []
    for record in refinements:
        old = record["response"] + (f"  (weight {record['weight']:.2g})" if "weight" in record else "")
        lines.append([record["id"], record["prompt"], old, "\n".join(new_answers(record)), counts_now(record)])
    return lines


def new_answers(record: dict[str, Any]) -> list[str]:
    """The different answers of the last round, the most trusted first."""
    tally: dict[str, Any] = {}
    for answer in record["rounds"][max(record["rounds"])]:
        tally.setdefault(answer["response"], []).append(answer)
    lines = []
    for text, same in sorted(tally.items(), key=lambda item: -item[1][0].get("agreement", 0)):
        first = same[0]
        notes = [f"×{len(same)}"] if len(same) > 1 else []
        notes += [f"agreement {first['agreement']:.2f}"] if "agreement" in first else []
        if first.get("token_ids"):
            notes.append(f"log p {first['logprob'] / len(first['token_ids']):.2f}")
        notes += ["cut off"] if not first.get("finished", True) else []
        notes += ["counts"] if any(answer.get("used") for answer in same) else []
        lines.append(f"{text}  ({', '.join(notes)})" if notes else text)
    return lines


def counts_now(record: dict[str, Any]) -> str:
    """`new`, with the weight of the group where it is known, or `old`."""
    used = any(answer.get("used") for answer in record["rounds"][max(record["rounds"])])
    if not used:
        return "old"
    return "new" + (f" (weight {record['weight_refined']:.2g})" if "weight_refined" in record else "")


def _percent(value: float) -> str:
    return "" if value != value else f"{value:.0%}"
