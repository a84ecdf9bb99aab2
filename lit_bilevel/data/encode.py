"""Rows to token ids, the prompt separated from the response that is learned.

With the tokenizer's chat template, a row has the template's own token ids, and what is learned is found in this order:
by the template's `{% generation %}` blocks; else by prefixes, each of which is verified: the text before an assistant
turn, rendered alone, must be what the whole text begins with, and the turn must stand there as it does where it is the
last one. What no mask can be right for is refused. Without a template the turns stand one to a line, the answers each
followed by EOS. Rows of plain text are never put into a template.

EOS ends every response that was not cut; BOS comes once, where the tokenizer or the template sets it.

Left out: packing; learning a part of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

Span = tuple[int, int]


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
    """

    input_ids: list[int]
    response_start: int
    truncated: bool
    earlier: list[int]
    dropped: int = 0
    rejected_ids: list[int] | None = None


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
        tokenizer: Any,
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
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))
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

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of single questions, ready for a response to follow.

        Where a tokenizer would merge the end of the prompt with the first word of a response (mostly a trailing space),
        the prompt ends before that token, as it does in training rows.
        """
        if not self.tokenizer.chat_template:
            return [self._bos + ids for ids in self._ids([text + "\n" for text in texts])]
        rendered = [self._render([("user", text)], True) for text in texts]
        followed = self._ids([text + "A" for text in rendered])
        return [ids[: _common(ids, longer)] for ids, longer in zip(self._ids(rendered), followed, strict=True)]

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
        for role, text in (*row.turns, ("assistant", row.response)):
            if found := self._special.search(text):
                raise ValueError(
                    f"the {role} text has {found[0]!r}, which the tokenizer reads as a control token; take it out"
                )

    # ---- without a template ----

    def _plain_rows(self, rows: Sequence[Row]) -> list[Encoded | ValueError]:
        eos = self.tokenizer.eos_token_id
        turns = [[*row.turns, ("assistant", row.response)] for row in rows]
        texts = [text if role == "assistant" else text + "\n" for own in turns for role, text in own]
        pieces = iter(self._ids(texts) if texts else [])
        encoded: list[Encoded | ValueError] = []
        for own in turns:
            ids, spans = list(self._bos), []
            for role, _ in own:
                start = len(ids)
                ids += next(pieces)
                if role == "assistant":
                    ids.append(eos)
                    spans.append((max(start, 1), len(ids)))
            encoded.append(self._cut(ids, spans))
        return encoded

    # ---- with one ----

    def _chat_rows(self, rows: Sequence[Row]) -> list[Encoded | ValueError]:
        if self._blocks:
            return [self._by_blocks(row) for row in rows]
        drafts = [self._draft(row) for row in rows]
        texts = [draft[0] for draft in drafts if not isinstance(draft, ValueError)]
        if not texts:
            return [draft for draft in drafts if isinstance(draft, ValueError)]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        found = zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        encoded: list[Encoded | ValueError] = []
        for draft in drafts:
            if isinstance(draft, ValueError):
                encoded.append(draft)
                continue
            ids, offsets = next(found)
            spans = [self._upto_eos(ids, _covering(offsets, span)) for span in draft[1]]
            encoded.append(self._finished(ids, spans))
        return encoded

    def _draft(self, row: Row) -> tuple[str, list[Span]] | ValueError:
        """The text of a row and the characters of its learned turns, by verified prefixes."""
        turns = [*row.turns, ("assistant", row.response)]
        answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        try:
            text = self._render(turns, False)
            learned = answers if self.train_on == "all" else answers[-1:]
            return text, [self._span(turns, number, text) for number in learned]
        except (TemplateError, ValueError, TypeError) as error:
            return ValueError(f"the chat template does not take it: {error}")

    def _span(self, turns: list[tuple[str, str]], number: int, text: str) -> Span:
        """The characters of an assistant turn."""
        prompt = self._render(turns[:number], True)
        if not text.startswith(prompt):
            raise ValueError(f"the full text does not begin with the prompt of turn {number + 1}, so no mask is right")
        if number == len(turns) - 1:
            return len(prompt), len(text)
        alone = self._render(turns[: number + 1], False)
        content = turns[number][1].strip()
        for turn in (alone[len(prompt) :], content + alone.rpartition(content)[2]):
            if alone.startswith(prompt) and text.startswith(turn, len(prompt)):
                return len(prompt), len(prompt) + len(turn)
        raise ValueError(
            f"turn {number + 1} is rendered in another way when more turns follow, so it cannot be masked; use"
            " `data.train_on: last` or a template with generation blocks"
        )

    def _by_blocks(self, row: Row) -> Encoded | ValueError:
        messages = _messages([*row.turns, ("assistant", row.response)])
        try:
            result = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            return ValueError(f"the chat template does not take it: {error}")
        ids, mask = list(result["input_ids"]), list(result["assistant_masks"])
        edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
        spans = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        if not spans:
            return ValueError("the template's generation blocks hold nothing of it")
        eos = self.tokenizer.eos_token_id
        spans = [(start, stop + (ids[stop : stop + 1] == [eos])) for start, stop in spans]
        return self._finished(ids, spans if self.train_on == "all" else spans[-1:])

    def _upto_eos(self, ids: list[int], span: Span) -> Span:
        """The span without what a template adds after EOS (a newline, mostly): it is never generated."""
        start, stop = span
        eos = self.tokenizer.eos_token_id
        while stop > start and eos in ids[start:stop] and ids[stop - 1] != eos:
            stop -= 1
        return start, stop

    def _finished(self, ids: list[int], spans: list[Span]) -> Encoded | ValueError:
        """The last span ends the row, with EOS."""
        eos = self.tokenizer.eos_token_id
        start, stop = spans[-1]
        ids = ids[:stop] if ids[start:stop][-1:] == [eos] else [*ids[:stop], eos]
        return self._cut(ids, [*spans[:-1], (start, len(ids))])

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

    def _render(self, turns: Iterable[tuple[str, str]], generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            _messages(turns), tokenize=False, add_generation_prompt=generation_prompt
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids


def _messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _covering(offsets: list[Span], span: Span) -> Span:
    """The tokens that reach into a span of characters."""
    start = next((i for i, (_, end) in enumerate(offsets) if end > span[0]), len(offsets))
    stop = next((i for i in range(start, len(offsets)) if offsets[i][0] >= span[1]), len(offsets))
    return start, stop


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
