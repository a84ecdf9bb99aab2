"""Turns rows into token ids, the prompt separated from the response that is learned.

With the tokenizer's chat template, a row has the template's own token ids, and what is learned is found in this order:
by the template's `{% generation %}` blocks; else by prefixes, each of which is verified: the text before an assistant
turn, rendered alone, must be what the whole text begins with, and the turn must stand there as it does where it is the
last one. What no mask can be right for is refused. Without a template the turns stand one to a line, the answers each
followed by EOS. Rows of plain text are never put into a template.

EOS ends every response that was not cut; BOS comes once, where the tokenizer or the template sets it. Where a template
says something else than the row, the row has a notice of that; where nothing of the answer is left, it is refused.

Left out: packing; learning a part of a turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lit_bilevel.data.masks import Draft, Span, by_blocks, covering, draft
from lit_bilevel.data.template import (
    ERRORS,
    Conversation,
    Template,
    common,
    conversation_of,
    refusal,
    special_tokens,
    texts_of,
)
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row.

    Args:
        input_ids: of prompt and response.
        response_start: position of the first token of the last response.
        truncated: whether `max_length` cut anything off.
        earlier: positions of the learned tokens of earlier responses.
        dropped: how many tokens of the prompt were cut off.
        rejected_ids: of a preference pair, the ids of prompt and rejected response.
        notice: in what the text differs from what the row says.
    """

    input_ids: list[int]
    response_start: int
    truncated: bool
    earlier: list[int]
    dropped: int = 0
    rejected_ids: list[int] | None = None
    notice: str | None = None


class Encoder:
    """Turns rows into token ids for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: longest sequence in tokens.
        truncation: the side that is cut where a row is longer: `right`, the end of the response, or `left`, the oldest
            tokens of the prompt (after BOS) and only then the end of the response.
        train_on: which assistant turns are learned, the `last` or `all`.

    Raises:
        UserError: if the tokenizer has no EOS token, or a chat template that cannot be masked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncation: Literal["right", "left"] = "right",
        train_on: Literal["last", "all"] = "last",
    ):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so responses could not learn to end;"
                " set `eos_token` in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.truncation, self.train_on = truncation, train_on
        probe = tokenizer("a").input_ids
        self._bos = probe[:1] if probe[:1] == [tokenizer.bos_token_id] else []
        self._special = special_tokens(tokenizer)
        self.template = Template(tokenizer)
        self._blocks = False
        self.max_length = 1 << 20
        if tokenizer.chat_template:
            self._check_template()
        self.max_length = max_length

    def _check_template(self) -> None:
        name = repr(self.tokenizer.name_or_path)
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {name} cannot say which characters a token covers, which masking under a chat"
                " template needs; use its fast version."
            )
        remedy = (
            "give the tokenizer a template with `{% generation %}` blocks around the assistant's turns, or one whose"
            " text before a turn does not depend on what follows"
        )
        try:
            self._blocks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.tokenizer.get_chat_template()))
            encoded = self.rows([Row(0, "probe", "one?", "two!", "")])[0]
        except ValueError as error:
            raise UserError(f"the chat template of {name} cannot be used ({error}); {remedy}.") from error
        if isinstance(encoded, ValueError):
            raise UserError(f"the chat template of {name} cannot be used ({encoded}); {remedy}.")
        learned = self.tokenizer.decode(encoded.input_ids[encoded.response_start :])
        if "two!" not in learned:
            raise UserError(
                f"the chat template of {name} puts {learned!r} in the place of the answer 'two!'; {remedy}."
            )

    def identity(self, truncated: bool) -> dict[str, Any]:
        """What token ids depend on beside rows and tokenizer, and not on the day.

        Args:
            truncated: whether `max_length` cut any row.
        """
        template = self.tokenizer.chat_template or ""
        facts: dict[str, Any] = {"the chat template (digest)": hashlib.sha256(str(template).encode()).hexdigest()[:12]}
        if truncated:
            facts |= {"`data.max_length`": self.max_length, "`data.truncation`": self.truncation}
        return facts

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of single questions, ready for a response to follow.

        Where a tokenizer would merge the end of the prompt with the first word of a response (mostly a trailing space),
        the prompt ends before that token, as it does in training rows.
        """
        if not self.tokenizer.chat_template:
            return [self._bos + ids for ids in self._ids([text + "\n" for text in texts])]
        rendered = [self.template.render([{"role": "user", "content": text}], prompt=True) for text in texts]
        followed = self._ids([text + "A" for text in rendered])
        return [ids[: common(ids, longer)] for ids, longer in zip(self._ids(rendered), followed, strict=True)]

    def rows(self, rows: Sequence[Row]) -> list[Encoded | ValueError]:
        """Token ids of whole rows; in the place of one that cannot be encoded, the reason."""
        encoded: list[Encoded | ValueError] = [ValueError()] * len(rows)
        plain: list[int] = []
        chats: list[int] = []
        for index, row in enumerate(rows):
            try:
                self._refuse_special(row)
                (chats if row.turns and self.tokenizer.chat_template else plain).append(index)
            except ValueError as error:
                encoded[index] = error
        for part, encode in ((plain, self._plain_rows), (chats, self._chat_rows)):
            for index, result in zip(part, encode([rows[index] for index in part]), strict=True):
                encoded[index] = result
        return encoded

    def _refuse_special(self, row: Row) -> None:
        for role, text in texts_of(conversation_of(row)):
            if match := self._special.search(text):
                raise ValueError(
                    f"the {role} text has {match[0]!r}, which the tokenizer reads as a control token; take it out"
                )

    def _select_learned(self, talk: Conversation) -> list[int]:
        """Positions of the answers that are learned.

        Raises:
            ValueError: if the last one is not among them and no other may be.
        """
        if self.train_on == "all":
            return talk.learned
        if talk.learned[-1:] != [len(talk.messages) - 1]:
            raise ValueError(
                "its last answer is not to be learned (`weight: 0` or `train: false`); `data.train_on: all` learns the"
                " earlier ones"
            )
        return talk.learned[-1:]

    # ---- without a template ----

    def _plain_rows(self, rows: Sequence[Row]) -> list[Encoded | ValueError]:
        talks = [conversation_of(row) for row in rows]
        texts = [m["content"] + "\n" * (m["role"] != "assistant") for talk in talks for m in talk.messages]
        pieces = iter(self._ids(texts) if texts else [])
        encoded: list[Encoded | ValueError] = []
        for talk in talks:
            ids, spans = list(self._bos), []
            for message in talk.messages:
                start = len(ids)
                ids += next(pieces)
                if message["role"] == "assistant":
                    ids.append(self.tokenizer.eos_token_id)
                    spans.append((max(start, 1), len(ids)))
            encoded.append(self._plain(talk, ids, spans))
        return encoded

    def _plain(self, talk: Conversation, ids: list[int], spans: list[Span]) -> Encoded | ValueError:
        if talk.tools or any(message["role"] == "tool" or "tool_calls" in message for message in talk.messages):
            return ValueError("the tokenizer has no chat template to put the fields `tools` and `tool_calls` into")
        answers = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
        try:
            own = self._select_learned(talk)
        except ValueError as error:
            return error
        made = self._cut(ids, [span for number, span in zip(answers, spans, strict=True) if number in own])
        if isinstance(made, Encoded) and any("reasoning_content" in message for message in talk.messages):
            return replace(made, notice="there is no chat template to put the reasoning into")
        return made

    # ---- with one ----

    def _chat_rows(self, rows: Sequence[Row]) -> list[Encoded | ValueError]:
        if self._blocks:
            return [self._by_blocks(row) for row in rows]
        drafts = [self._draft(row) for row in rows]
        texts = [one.text for one in drafts if not isinstance(one, ValueError)]
        if not texts:
            return [one for one in drafts if isinstance(one, ValueError)]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rendered = zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        encoded: list[Encoded | ValueError] = []
        for one in drafts:
            if isinstance(one, ValueError):
                encoded.append(one)
                continue
            ids, offsets = next(rendered)
            spans = [self._upto_eos(ids, covering(offsets, span)) for span in one.spans]
            encoded.append(self._finish(ids, spans, one.notice))
        return encoded

    def _draft(self, row: Row) -> Draft | ValueError:
        try:
            talk = self.template.with_readable_calls(conversation_of(row))
            return draft(self.template, talk, self._select_learned(talk))
        except ERRORS as error:
            return refusal(error)

    def _by_blocks(self, row: Row) -> Encoded | ValueError:
        try:
            talk = self.template.with_readable_calls(conversation_of(row))
            ids, spans, notice = by_blocks(self.template, talk, self._select_learned(talk), self.train_on == "all")
        except ERRORS as error:
            return refusal(error)
        eos = self.tokenizer.eos_token_id
        return self._finish(ids, [(a, b + (ids[b : b + 1] == [eos])) for a, b in spans], notice)

    def _upto_eos(self, ids: list[int], span: Span) -> Span:
        """The span without what a template adds after EOS (a newline, mostly): it is never generated."""
        start, stop = span
        eos = self.tokenizer.eos_token_id
        while stop > start and eos in ids[start:stop] and ids[stop - 1] != eos:
            stop -= 1
        return start, stop

    def _finish(self, ids: list[int], spans: list[Span], notice: str | None) -> Encoded | ValueError:
        """The last span ends the row, with EOS."""
        eos = self.tokenizer.eos_token_id
        start, stop = spans[-1]
        ids = ids[:stop] if ids[start:stop][-1:] == [eos] else [*ids[:stop], eos]
        made = self._cut(ids, [*spans[:-1], (start, len(ids))])
        return made if isinstance(made, ValueError) else replace(made, notice=notice)

    # ---- both ----

    def _cut(self, ids: list[int], spans: list[Span]) -> Encoded | ValueError:
        """At most `max_length` tokens; the positions of the spans with them."""
        start = spans[-1][0]
        earlier = [i for span in spans[:-1] for i in range(*span)] if self.train_on == "all" else []
        if len(ids) - start < 2:
            return ValueError("the tokenizer makes no token of the response")
        excess, drop = len(ids) - self.max_length, 0
        kept = 1  # token before the first that is predicted, BOS where there is one
        if excess > 0 and self.truncation == "left":
            head = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            drop = min(excess, start - kept)
            ids = ids[:head] + ids[head + drop :]
            start -= drop
            earlier = [i - drop for i in earlier if i - drop >= head]
        if start >= self.max_length:
            return ValueError(
                f"no response token fits into `data.max_length` {self.max_length}: the prompt alone has {start} tokens;"
                " raise it or set `data.truncation: left`"
            )
        return Encoded(ids[: self.max_length], start, excess > 0, [i for i in earlier if i >= kept], drop)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
