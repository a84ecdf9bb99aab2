"""Checks, before the policy is loaded, that the rows fit its context and their tokens its embeddings.

    context 64      a row of 70 tokens: refused by name        a prompt of 60, to be answered: room for 4
    4,096 embeddings and a tokenizer of 4,098 tokens: refused where a row has one of the two

Left out: rows that only an adapter or a tokenizer file added later would fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_bilevel.data.table import column
from lit_bilevel.policy.context import context_of, vocabulary_of
from lit_bilevel.policy.load import policy_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset

    from lit_bilevel.module import LitBilevel

NAMED = 5  # rows that a message names
BLOCK = 1 << 16  # rows that are looked at together


def find_oversized(module: LitBilevel, stage: str) -> list[str]:
    """What of the data does not fit the policy of a `LitBilevel`, as problems to be told."""
    sets = getattr(getattr(module.trainer, "datamodule", None), "sets", {})
    config = policy_config(module.policy_settings)
    if config is None:
        return []
    if stage == "predict":  # of the test rows, the prompts alone
        sets = {name: table for name, table in sets.items() if name == "test"}
    problems = _beyond_vocabulary(module, sets, vocabulary_of(config))
    context = context_of(config)
    if context is None:
        return problems
    return problems + (_without_room(sets, context) if stage == "predict" else _beyond_context(sets, context))


def _beyond_context(sets: Mapping[str, Dataset], context: int) -> list[str]:
    lengths = {name: column(table, "length").to_numpy() for name, table in sets.items() if len(table)}
    name = max(lengths, key=lambda name: lengths[name].max(), default="")
    if not lengths or (longest := lengths[name].max()) <= context:
        return []
    id = sets[name][int(lengths[name].argmax())]["id"]
    return [
        f"the longest row has {longest} tokens and the policy was made for {context}; set `data.max_length` to at most"
        f" {context} (it is {id!r} of the {name} rows)"
    ]


def _without_room(sets: Mapping[str, Dataset], context: int) -> list[str]:
    ids = [
        id
        for table in sets.values()
        for id, start in zip(column(table, "id").to_pylist(), column(table, "response_start").to_pylist(), strict=True)
        if start >= context
    ]
    if not ids:
        return []
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return [
        f"the policy was made for {context} tokens, and the test prompts {', '.join(map(repr, ids[:NAMED]))}{more} have"
        f" as many or more, so there is no room for an answer; shorten them, or set `data.max_length` to at most"
        f" {context} and `data.truncation: left`"
    ]


def _beyond_vocabulary(module: LitBilevel, sets: Mapping[str, Dataset], vocabulary: int) -> list[str]:
    for name, table in sets.items():
        for tokens in ("input_ids", "rejected_ids"):
            row = _first_beyond(table, tokens, vocabulary) if tokens in table.column_names else None
            if row is not None:
                return [
                    f"the policy has embeddings for {vocabulary} tokens and its tokenizer has {len(module.tokenizer)};"
                    f" row {table[row]['id']!r} of the {name} rows has a token without one; give `data.tokenizer` the"
                    " tokenizer that the policy was made with, or let the embeddings grow first (`model ="
                    " AutoModelForCausalLM.from_pretrained(…); model.resize_token_embeddings(len(tokenizer));"
                    " model.save_pretrained(…)`)"
                ]
    return []


def _first_beyond(table: Dataset, tokens: str, vocabulary: int) -> int | None:
    """Position of the first row with an id from `vocabulary` on."""
    import pyarrow.compute

    start = 0
    for part in table.select_columns([tokens]).with_format("arrow").iter(BLOCK):
        ids = part[tokens]
        if (pyarrow.compute.max(pyarrow.compute.list_flatten(ids)).as_py() or 0) >= vocabulary:
            return start + next(row for row, own in enumerate(ids.to_pylist()) if own and max(own) >= vocabulary)
        start += len(ids)
    return None
