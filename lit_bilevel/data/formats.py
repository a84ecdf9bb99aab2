"""Turns the columns of a record into the turns of a conversation.

One small class a format; `detect` chooses by the columns that are there. Of a preference pair both answers are read;
which are trained on is for the objective to say. Left out: what fields beside role and text mean (`fields.py`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from lit_bilevel.data.fields import CALLS, Turn, has_calls, text_of_parts

ROLES = ("system", "user", "assistant", "tool")
MAX_TEXT = 1 << 24
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
"""What begins a turn in a transcript (Anthropic's hh-rlhf)."""


class Format(ABC):
    """Reads one kind of record."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Further columns that are read."""

    def fits(self, columns: Collection[str]) -> bool:
        """Whether records with these columns can be of this format."""
        return set(self.required) <= set(columns)

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        """The turns of a record, the last of which is the assistant's.

        Raises:
            ValueError: naming the field that is missing or wrong.
        """


class Messages(Format):
    """`messages`: a list of `{role, content}`, and optionally a `system` prompt beside it."""

    name = "messages"
    required = ("messages",)
    optional = ("system",)

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        return conversation(after_system(record, turns_field(record, "messages"), "messages"), "messages")


class ShareGPT(Format):
    """`conversations`: a list of `{from, value}`, and optionally a `system` prompt beside it."""

    name = "sharegpt"
    required = ("conversations",)
    optional = ("system",)
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # noqa: RUF012

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        turns = turns_field(record, "conversations", ("from", "value"), self.roles)
        return conversation(after_system(record, turns, "conversations"), "conversations")


class Preference(Format):
    """`chosen` and `rejected`, two answers to one question, of which the better or both are learned.

    Both are strings or lists of messages: answers to the column `prompt` (a string or a list of messages), or, where
    there is none or they begin with a user or system turn, whole conversations that differ in their last turn; as
    strings these are transcripts ("\\n\\nHuman: …\\n\\nAssistant: …").
    """

    name = "preference"
    required = ("chosen", "rejected")
    optional = ("prompt", "system")

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        turns, chosen, _ = self.pair(record)
        return [*turns, Turn("assistant", chosen)]

    def pair(self, record: Mapping[str, Any]) -> tuple[list[Turn], str, str]:
        """The turns up to the question, the chosen answer and the rejected one.

        Raises:
            ValueError: naming the field that is missing or wrong, or if the two do not answer the same question.
        """
        chosen, rejected = (self._conversation(record, name) for name in self.required)
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("the fields `chosen` and `rejected` do not answer the same question")
        for turn in (chosen[-1], rejected[-1]):
            if has_calls(turn.more):
                raise ValueError("tool calls of the answers that are compared are not read")
        return chosen[:-1], chosen[-1].content, rejected[-1].content

    def _conversation(self, record: Mapping[str, Any], name: str) -> list[Turn]:
        if isinstance(record.get(name), list):
            answer = turns_field(record, name)
            if answer[0][0] != "assistant":
                return conversation(after_system(record, answer, name), name)
        elif "prompt" not in record and SPEAKER.match(text_field(record, name)):
            return conversation([*system_turn(record), *transcript(record, name)], name)
        else:
            answer = [Turn("assistant", text_field(record, name))]
        if isinstance(record.get("prompt"), list):
            return conversation(after_system(record, turns_field(record, "prompt"), "prompt") + answer, name)
        return conversation([*system_turn(record), Turn("user", text_field(record, "prompt")), *answer], name)


class PromptResponse(Format):
    """`prompt` and `response` (or `completion`): two strings, or two lists of messages."""

    name = "prompt_response"
    required = ("prompt", "response")
    optional = ("completion", "system")

    def fits(self, columns: Collection[str]) -> bool:
        return "prompt" in columns and ("response" in columns or "completion" in columns)

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        answer = "completion" if "completion" in record and "response" not in record else "response"
        if isinstance(record.get("prompt"), list) and isinstance(record.get(answer), list):
            turns = turns_field(record, "prompt") + turns_field(record, answer)
            return conversation(after_system(record, turns, "prompt"), "prompt")
        question = Turn("user", text_field(record, "prompt"))
        return [*system_turn(record), question, Turn("assistant", text_field(record, answer))]


class Alpaca(Format):
    """`instruction` and `output`, and optionally `input`, `system` and `history` (pairs of question and answer)."""

    name = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "system", "history")

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        question, more = text_field(record, "instruction"), record.get("input")
        if more is not None and (not isinstance(more, str) or more.strip()):
            question += "\n" + text_field(record, "input")
        turns = system_turn(record)
        for pair in record.get("history") or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("the field `history` must hold pairs of question and answer")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append(Turn(role, text_field({"history": text}, "history")))
        return [*turns, Turn("user", question), Turn("assistant", text_field(record, "output"))]


class Text(Format):
    """`text` alone: there is no prompt, and all of it is learned."""

    name = "text"
    required = ("text",)

    def read(self, record: Mapping[str, Any]) -> list[Turn]:
        return [Turn("assistant", text_field(record, "text"))]


FORMATS: tuple[Format, ...] = (Preference(), PromptResponse(), Messages(), ShareGPT(), Alpaca(), Text())


def detect(columns: Collection[str]) -> Format | None:
    """The first format that the columns fit."""
    return next((known for known in FORMATS if known.fits(columns)), None)


def text_field(record: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    """A string field with something in it.

    Raises:
        ValueError: if the field is missing, not a string, only white space, no valid Unicode, or enormous.
    """
    if name not in record:
        raise ValueError(f"the field `{name}` is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"the field `{name}` is {type(value).__name__}, not a string")
    if not may_be_empty and not value.strip():
        raise ValueError(f"the field `{name}` is empty")
    if len(value) > MAX_TEXT:
        raise ValueError(f"the field `{name}` has {len(value)} characters; at most {MAX_TEXT} are read")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field `{name}` is not UTF-8 text (character {error.start})") from None
    return value


def system_turn(record: Mapping[str, Any]) -> list[Turn]:
    """The system prompt that stands in a column of its own, if there is one."""
    value = record.get("system")
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [Turn("system", text_field(record, "system"))]


def after_system(record: Mapping[str, Any], turns: list[Turn], name: str) -> list[Turn]:
    """The turns of a field after the column `system`, where there is one.

    Raises:
        ValueError: if the turns begin with a system turn of their own.
    """
    system = system_turn(record)
    if system and turns[0].role == "system":
        raise ValueError(f"there is a field `system`, and `{name}` begins with a system turn too; leave one out")
    return system + turns


def turns_field(
    record: Mapping[str, Any],
    name: str,
    keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = {},
) -> list[Turn]:
    """A list of turns; only a system turn may be empty, and one that calls a tool.

    Raises:
        ValueError: naming the turn that is wrong.
    """
    turns = record.get(name)
    if not isinstance(turns, list) or not turns:
        kind = "empty" if isinstance(turns, list) else f"{type(turns).__name__}, not a list of turns"
        raise ValueError(f"the field `{name}` is {kind}" if name in record else f"the field `{name}` is missing")
    result = []
    for number, turn in enumerate(turns, start=1):
        try:
            if not isinstance(turn, Mapping):
                raise ValueError(f"{type(turn).__name__}, not an object")
            role = text_field(turn, keys[0])
            role = roles.get(role, "tool" if role == "function" else role)
            if role not in ROLES:
                raise ValueError(f"the role {role!r} is not one of {', '.join((*ROLES, *roles))}")
            calls = role == "assistant" and has_calls(turn)
            if not calls and any(turn.get(call) for call in CALLS):
                raise ValueError(f"a turn of the role {role!r} calls a tool")
            said = {**turn, keys[1]: text_of_parts(turn[keys[1]])} if keys[1] in turn else turn
            if calls and said.get(keys[1]) is None:
                said = {keys[1]: ""}
            content = text_field(said, keys[1], may_be_empty=calls or role in ("system", "tool"))
            result.append(Turn(role, content, {name: value for name, value in turn.items() if name not in keys}))
        except ValueError as error:
            raise ValueError(f"turn {number} of `{name}`: {error}") from None
    return result


def transcript(record: Mapping[str, Any], name: str) -> list[Turn]:
    """The turns of a string field that holds a whole conversation.

    Raises:
        ValueError: naming the turn that is empty.
    """
    _, *pieces = SPEAKER.split(text_field(record, name))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Turn(roles[speaker], text.strip()) for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)]
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            raise ValueError(f"turn {number} of `{name}` is empty")
    return turns


def conversation(turns: list[Turn], name: str) -> list[Turn]:
    """The turns, if they end with a question (or what a tool gave) and its answer.

    Raises:
        ValueError: if they do not.
    """
    last = [turn.role for turn in turns[-2:]]
    if last not in (["user", "assistant"], ["tool", "assistant"]):
        raise ValueError(
            f"`{name}` must end with a user turn and an assistant turn; its last turns are: {', '.join(last)}"
        )
    return turns
