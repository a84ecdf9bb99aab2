"""Turns preference pairs into token ids: both answers after the same prompt.

Each answer is encoded as a row of its own. Where their prompts differ at the end (a tokenizer may merge it with the
beginning of an answer), what is predicted begins at the earlier of the two places, so that both are conditioned on the
same tokens; where `left` truncation cut more from one prompt, the other loses as much. Earlier answers are the same in
both, so they would cancel and are not learned.

Left out: encoding the prompt once for both.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_bilevel.data.encode import Encoded, Encoder
from lit_bilevel.data.template import with_answer
from lit_bilevel.types import Row


def encode_with_pairs(encoder: Encoder, rows: Sequence[Row]) -> list[Encoded | ValueError]:
    """Token ids of rows, with both answers of those that are pairs; in the place of a bad one, the reason."""
    encoded = encoder.rows(rows)
    pairs = [(index, row) for index, row in enumerate(rows) if row.rejected is not None]
    if pairs:
        others = encoder.rows([with_answer(row, row.rejected or "") for _, row in pairs])
        for (index, _), other in zip(pairs, others, strict=True):
            encoded[index] = _join(encoder, encoded[index], other)
    return encoded


def _join(encoder: Encoder, chosen: Encoded | ValueError, rejected: Encoded | ValueError) -> Encoded | ValueError:
    if isinstance(chosen, ValueError):
        return chosen
    if isinstance(rejected, ValueError):
        return ValueError(f"the rejected answer: {rejected}")
    dropped = max(chosen.dropped, rejected.dropped)
    ids, other = (_cut(encoder, one, dropped - one.dropped) for one in (chosen, rejected))
    start = min(one.response_start - (dropped - one.dropped) for one in (chosen, rejected))
    if start < 1 or ids[:start] != other[:start]:
        return ValueError("the prompt has other tokens before the rejected answer than before the chosen one")
    if ids == other:
        return ValueError("both answers are the same tokens up to `data.max_length`; raise it")
    return Encoded(
        ids, start, chosen.truncated or rejected.truncated, [], dropped, other, chosen.notice or rejected.notice
    )


def _cut(encoder: Encoder, one: Encoded, count: int) -> list[int]:
    """The ids without so many more of the oldest tokens of the prompt, after BOS."""
    head = 1 if one.input_ids[0] == encoder.tokenizer.bos_token_id else 0
    return one.input_ids[:head] + one.input_ids[head + count :]
