"""Renders conversations by a chat template, and checks whether the text says what the row says.

The clock stands still while rows are encoded, so a template that writes the time gives every row the same one. Fields
that a template takes or leaves out (reasoning, tools, calls of tools) are found by rendering without them too: where
the text stays the same, the template has no place for them. Example: a template that cuts `<think>…</think>` renders
the answer `<think>two</think>5` as `5`, which is told as a difference.

Left out: tokens; `encode.py` makes them.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jinja2 import TemplateError

from lit_bilevel.data.fields import REASONING
from lit_bilevel.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
ERRORS = (TemplateError, ValueError, TypeError, KeyError)


class Conversation(NamedTuple):
    """A row's turns as a template takes them.

    Args:
        messages: the turns, the last of which is the answer.
        learned: positions of the answers that may be learned.
        tools: descriptions of tools, or nothing.
    """

    messages: list[Message]
    learned: list[int]
    tools: list[Any]


def conversation_of(row: Row) -> Conversation:
    """The conversation of a row."""
    if row.details:
        return Conversation(**json.loads(row.details))
    messages = [{"role": role, "content": text} for role, text in (*row.turns, ("assistant", row.response))]
    return Conversation(messages, [i for i, m in enumerate(messages) if m["role"] == "assistant"], [])


def cut_after_learned(row: Row, every: bool) -> Row:
    """A row that ends with the last answer that may be learned, where every such answer is; else the row itself.

    What comes after it would be seen by nothing that is learned.
    """
    if not row.details or not every:
        return row
    talk = conversation_of(row)
    last = talk.learned[-1]
    if last == len(talk.messages) - 1 or last == 0:
        return row
    kept = talk.messages[: last + 1]
    *history, question, answer = [(message["role"], message["content"]) for message in kept]
    details = json.dumps(talk._replace(messages=kept)._asdict(), ensure_ascii=False)
    return replace(row, history=tuple(history), prompt=question[1], response=answer[1], details=details)


def with_answer(row: Row, answer: str) -> Row:
    """A row with another answer in the place of its own."""
    if not row.details:
        return replace(row, response=answer)
    talk = conversation_of(row)
    messages = [*talk.messages[:-1], {"role": "assistant", "content": answer}]
    details = json.dumps(talk._replace(messages=messages)._asdict(), ensure_ascii=False)
    return replace(row, response=answer, details=details)


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.special = tokenizer, special_tokens(tokenizer)
        self._now = datetime.datetime.now()

    @functools.cached_property
    def _opening(self) -> str:
        """What a prompt ends with, so that an answer follows."""
        question = [{"role": "user", "content": "one?"}]
        return self.render(question, prompt=True).removeprefix(self.render(question))

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), prompt: bool = False) -> str:
        """The text of a conversation, with the beginning of an answer after it where it is a prompt."""
        text = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._still(tools),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return cast("str", text)

    def apply_with_masks(self, messages: Sequence[Message], tools: Sequence[Any]) -> Any:
        """Token ids (`input_ids`) and what the template's generation blocks hold (`assistant_masks`)."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._still(tools),
            tools=list(tools) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )

    def _still(self, tools: Sequence[Any]) -> str:
        """The template with the time at which this object was made in the place of calls for the time."""
        text = self.tokenizer.get_chat_template(None, list(tools) or None)
        return CLOCK.sub(lambda call: json.dumps(self._now.strftime(call[2])), text)

    def before(self, talk: Conversation, number: int) -> str:
        """The text before a turn of the assistant, up to where its answer begins.

        Where the template does not render the turns before it alone, as where there are none, it is what the
        conversation up to that turn has in common with one that has another answer there.
        """
        turns = talk.messages[:number]
        if any(turn["role"] != "system" for turn in turns):
            return self.render(turns, talk.tools, prompt=True)
        own = talk.messages[number]
        other = {"role": "assistant", "content": "b" if own["content"].strip()[:1] == "a" else "a"}
        left, right = (self.render([*turns, turn], talk.tools) for turn in (own, other))
        shared = left[: common(left, right)]
        head = shared.rfind(self._opening)
        return shared[: head + len(self._opening)] if self._opening and head >= 0 else shared

    def with_readable_calls(self, talk: Conversation) -> Conversation:
        """The conversation with arguments of calls as the template takes them: as objects, or else as strings of JSON.

        Raises:
            ValueError: if the template has no place for tools, calls or what a tool gave.
        """
        calls = any("tool_calls" in message for message in talk.messages)
        if not calls and not talk.tools and all(message["role"] != "tool" for message in talk.messages):
            return talk
        try:
            text = self.render(talk.messages, talk.tools)
        except ERRORS:
            talk = talk._replace(messages=[_with_strings(message) for message in talk.messages])
            text = self.render(talk.messages, talk.tools)
        if talk.tools and text == self.render(talk.messages):
            raise _no_place("tools")
        if calls and text == self.render(_without(talk.messages, ["tool_calls"]), talk.tools):
            raise _no_place("tool_calls")
        for message in talk.messages:
            if message["role"] == "tool" and not says(text, message["content"]):
                raise ValueError("the chat template leaves out a turn of the role `tool`; use one that takes it")
        return talk

    def find_omission(self, talk: Conversation, text: str) -> str | None:
        """What a rendered conversation lacks of the row, beside its answers; `None` where all is there."""
        reasoned = any(name in message for message in talk.messages for name in REASONING)
        if reasoned and text == self.render(_without(talk.messages, REASONING), talk.tools):
            return "the chat template leaves out the reasoning"
        for message in talk.messages:
            if message["role"] != "assistant" and not says(text, message["content"]):
                return f"the chat template leaves out or rewrites a turn of the role `{message['role']}`"
        return None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the texts that a tokenizer reads as control tokens."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special)))


def texts_of(talk: Conversation) -> Iterator[tuple[str, str]]:
    """Role and text of all that a conversation puts into a template, also reasoning, calls and tools."""
    for message in talk.messages:
        yield message["role"], message["content"]
        for value in (message.get("reasoning_content"), message.get("tool_calls")):
            if value:
                yield message["role"], value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if talk.tools:
        yield "tools", json.dumps(talk.tools, ensure_ascii=False)


def refusal(error: Exception) -> ValueError:
    """The reason why a row cannot be encoded, whoever found it."""
    if isinstance(error, ValueError):
        return error
    return ValueError(f"the chat template does not take it: {error}")


def says(text: str, content: str) -> bool:
    """Whether a text has another one in it, white space aside."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _without(messages: Iterable[Message], names: Sequence[str]) -> list[Message]:
    return [{name: value for name, value in message.items() if name not in names} for message in messages]


def _with_strings(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        inner = inner | {"arguments": json.dumps(inner.get("arguments", {}), ensure_ascii=False)}
        calls.append(call | {"function": inner} if "function" in call else inner)
    return message | {"tool_calls": calls}


def _no_place(name: str) -> ValueError:
    return ValueError(f"the chat template leaves out the field `{name}`; use one that takes it, or take the field out")
