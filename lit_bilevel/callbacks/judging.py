"""Measures how far the new answers of a round agree, and keeps those that a `Trust` lets through.

Left out: which rows were chosen and what is done with a verdict; `SelfRefine` says that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lit_bilevel.data.responses import is_usable
from lit_bilevel.refinement.responses_file import text_of
from lit_bilevel.refinement.trust import Answered, Trust, Verdict
from lit_bilevel.types import Response

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Answers = dict[int, list[Response]]


def compare_answers(
    sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    generated: Mapping[str, Answers],
    trust: Trust,
    keep_unfinished: bool,
) -> tuple[Answers, list[Answered], list[Answered]]:
    """The answers of the pool's rows with their agreement, and the texts of both sides as `Trust.judge` takes them.

    Args:
        sets: the tables by name.
        tokenizer: of the policy.
        generated: responses by set and row.
        trust: tells how far answers agree.
        keep_unfinished: whether responses count that did not end by themselves.
    """
    sides: dict[str, list[Answered]] = {}
    for name, responses in generated.items():
        known = sets[name].select_columns(["response"])[list(responses)]["response"] if responses else []
        texts = [
            [text_of(r, tokenizer) if is_usable(r, keep_unfinished) else None for r in g] for g in responses.values()
        ]
        sides[name] = [Answered(old, tuple(new)) for old, new in zip(known, texts, strict=True)]
    answers = {
        row: [replace(r, agreement=share) for r, share in zip(group, trust.agreement(answered.new), strict=True)]
        for (row, group), answered in zip(generated["pool"].items(), sides["pool"], strict=True)
    }
    return answers, sides["pool"], sides["monitor"]


def keep_trusted(answers: Answers, verdict: Verdict | None, keep_unfinished: bool) -> Answers:
    """The answers that are trained on; all usable ones where nothing was judged."""
    least = 0.0 if verdict is None or verdict.least is None else verdict.least
    return {
        row: [r for r in group if is_usable(r, keep_unfinished) and r.agreement >= least]
        for row, group in answers.items()
    }
