"""Rows to token ids, the prompt separated from the response that is learned.

With the tokenizer's chat template, the prompt is the rendered user turn plus the generation prompt and the response is
what the template adds for the answer; a template whose full text does not begin with its prompt is refused, since no
mask can then be right. Without a template the text is `prompt + "\\n"`, then the response. EOS ends every response that
was not truncated; BOS comes once, where the tokenizer sets it.

Left out: packing and multi-turn masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_bilevel.errors import UserError
from lit_bilevel.types import Row


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
        probe = tokenizer("a").input_ids
        self._bos = probe[:1] if tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id else []

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, ready for a response to follow."""
        if self.tokenizer.chat_template:
            return self._plain_ids([self._render([{"role": "user", "content": text}], True) for text in texts])
        return [self._bos + ids for ids in self._plain_ids([text + "\n" for text in texts])]

    def rows(self, rows: Sequence[Row]) -> list[Encoded]:
        """Token ids of whole rows.

        Raises:
            UserError: if the chat template cannot be masked.
        """
        prompts = self.prompts([row.prompt for row in rows])
        responses = self._responses(rows, prompts)
        return [self._joined(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _responses(self, rows: Sequence[Row], prompts: list[list[int]]) -> list[list[int]]:
        if not self.tokenizer.chat_template:
            return self._plain_ids([row.response for row in rows])
        texts = [
            self._render(
                [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}], False
            )
            for row in rows
        ]
        responses = []
        for row, ids, prompt in zip(rows, self._plain_ids(texts), prompts, strict=True):
            if ids[: len(prompt)] != prompt:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path!r} renders row {row.id!r} so that the full text"
                    " does not begin with the prompt, and the response cannot be masked; use a template with an"
                    " unchanged prefix."
                )
            responses.append(self._upto_eos(ids[len(prompt) :]))
        return responses

    def _upto_eos(self, ids: list[int]) -> list[int]:
        """Cut what a template adds after the last EOS (a newline, mostly): it is never generated."""
        eos = self.tokenizer.eos_token_id
        return ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else ids

    def _joined(self, prompt: list[int], response: list[int]) -> Encoded:
        eos = self.tokenizer.eos_token_id
        ids = prompt + response + ([] if response[-1:] == [eos] else [eos])
        return Encoded(ids[: self.max_length], len(prompt), len(ids) > self.max_length)

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids
