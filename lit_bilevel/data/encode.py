"""Rows to token ids, the prompt separated from the response that is learned.

With the tokenizer's chat template, a row has the template's own token ids; the response begins with the first token
that reaches beyond the rendered prompt. A template whose full text does not begin with its prompt is refused, since no
mask can then be right. Without a template the text is the prompt, a newline, then the response. EOS ends every
response that was not truncated; BOS comes once, where the tokenizer or the template sets it.

Left out: packing and multi-turn masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from datasets import Dataset

from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

COLUMNS = ("row", "id", "prompt", "response", "source", "input_ids", "response_start", "truncated")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row; `truncated` says that the response was cut at `max_length`."""

    input_ids: list[int]
    response_start: int
    truncated: bool


class Encoder:
    """Turns rows into token ids for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: longest sequence in tokens; longer responses are cut on the right.

    Raises:
        UserError: if the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so responses could not learn to end;"
                " set `eos_token` in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        if tokenizer.chat_template and not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} cannot say which characters a token covers, which"
                " masking under a chat template needs; use its fast version."
            )
        probe = tokenizer("a").input_ids
        self._bos = probe[:1] if tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id else []

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, ready for a response to follow.

        Where a tokenizer would merge the end of the prompt with the first word of a response (mostly a trailing space),
        the prompt ends before that token, as it does in training rows.
        """
        if not self.tokenizer.chat_template:
            return [self._bos + ids for ids in self._ids([text + "\n" for text in texts])]
        rendered = [self._render([{"role": "user", "content": text}], True) for text in texts]
        followed = self._ids([text + "A" for text in rendered])
        return [ids[: _common(ids, longer)] for ids, longer in zip(self._ids(rendered), followed, strict=True)]

    def rows(self, rows: Sequence[Row]) -> list[Encoded]:
        """Token ids of whole rows.

        Raises:
            UserError: if the chat template cannot be masked.
        """
        if self.tokenizer.chat_template:
            return self._chat_rows(rows)
        prompts = self.prompts([row.prompt for row in rows])
        responses = self._ids([row.response for row in rows])
        return [
            self._joined(prompt + response, len(prompt)) for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _chat_rows(self, rows: Sequence[Row]) -> list[Encoded]:
        users = [{"role": "user", "content": row.prompt} for row in rows]
        prompts = [self._render([user], True) for user in users]
        answers = [{"role": "assistant", "content": row.response} for row in rows]
        texts = [self._render(list(turns), False) for turns in zip(users, answers, strict=True)]
        for row, prompt, text in zip(rows, prompts, texts, strict=True):
            if not text.startswith(prompt):
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path!r} renders row {row.id!r} so that the full text"
                    " does not begin with the prompt, and the response cannot be masked; use a template with an"
                    " unchanged prefix."
                )
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        encoded = []
        for ids, offsets, prompt in zip(tokens.input_ids, tokens.offset_mapping, prompts, strict=True):
            start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
            encoded.append(self._joined(ids[:start] + self._upto_eos(ids[start:]), start))
        return encoded

    def _upto_eos(self, ids: list[int]) -> list[int]:
        """Cut what a template adds after the last EOS (a newline, mostly): it is never generated."""
        eos = self.tokenizer.eos_token_id
        return ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else ids

    def _joined(self, ids: list[int], start: int) -> Encoded:
        eos = self.tokenizer.eos_token_id
        ids = ids if ids[start:][-1:] == [eos] else [*ids, eos]
        return Encoded(ids[: self.max_length], start, len(ids) > self.max_length)

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids


def encoded_table(rows: Sequence[Row], encoder: Encoder, source_names: Sequence[str]) -> tuple[Dataset, list[str]]:
    """Rows with their token ids as a table, and the rows that were left out because no response token fits.

    Args:
        rows: the rows.
        encoder: for their tokenizer.
        source_names: names of the sources; a row's number is its position here, or -1.
    """
    numbers = {source: number for number, source in enumerate(source_names)}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    lost = []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for row, encoded in zip(part, encoder.rows(part), strict=True):
            if encoded.response_start >= len(encoded.input_ids):
                lost.append(f"id {row.id!r}: the prompt alone has {encoded.response_start} tokens")
                continue
            values = (row.row, row.id, row.prompt, row.response, numbers.get(row.source, -1))
            for name, value in zip(COLUMNS, (*values, *astuple(encoded)), strict=True):
                columns[name].append(value)
    return Dataset.from_dict(columns), lost


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
