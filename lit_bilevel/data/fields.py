"""Reads the fields of a record that stand beside role and text, and refuses those that change what it means.

Honoured: `weight: 0` or `train: false` of an answer (it is not learned), `reasoning_content` or `thinking` of an answer
and `tools` of a record (both handed to the chat template), `tool_calls` and `function_call` of an answer, and turns of
the role `tool`. Refused by name: pictures, sounds, and whatever else changes what is asked or learned and is not read.
All others are metadata; their names are collected, to be said once.

Example: `{"role": "assistant", "content": "Lisbon", "weight": 0}` is a turn that the policy sees and does not learn.
Left out: weights between 0 and 1, and learning a part of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

REASONING = ("reasoning_content", "thinking", "reasoning")
LEARNED = ("weight", "train", "training", "trainable", "loss")
CALLS = ("tool_calls", "function_call")
OF_TOOLS = ("name", "tool_call_id")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REFUSED = (*MEDIA, "train_detail", "training_detail", "prefix", "partial")
OF_RECORDS = ("id", "source", "tools", "functions", "label", "kto_tag", *MEDIA, "chat_template_kwargs")


class Turn(NamedTuple):
    """A turn: who speaks, the text, and the other fields that the record gives it."""

    role: str
    content: str
    more: Mapping[str, Any] = {}


class Reading(NamedTuple):
    """What `read_fields` found: the conversation as JSON where role and text are not all of it, and unread names."""

    details: str
    unread: set[str]


def read_fields(record: Mapping[str, Any], turns: Sequence[Turn], answers: bool) -> Reading:
    """Look at the fields of a record and of its turns.

    Args:
        record: with our names of columns.
        turns: as its format read them.
        answers: whether the record is a question with an answer, and not plain text or a pair.

    Raises:
        ValueError: naming a field that changes what the record means and is not read.
    """
    for name in (*MEDIA, "chat_template_kwargs"):
        if _says_something(record.get(name)):
            raise ValueError(f"the field `{name}` is not read, and the row would mean something else without it")
    for name in ("label", "kto_tag"):
        if answers and (record.get(name) is False or str(record.get(name)).lower() == "false"):
            raise ValueError(f"the field `{name}` is false, so its answer is a bad one, and it would be learned")
    tools = _tools(record)
    messages, learned, unread = [], [], set[str]()
    for number, turn in enumerate(turns):
        try:
            message, own = _message(turn)
        except ValueError as error:
            raise ValueError(f"turn {number + 1}: {error}") from None
        messages.append(message)
        unread |= own
        if turn.role == "assistant" and _is_learned(number, turn):
            learned.append(number)
    answered = sum(turn.role == "assistant" for turn in turns)
    plain = all(message.keys() == {"role", "content"} and message["role"] != "tool" for message in messages)
    if plain and not tools and len(learned) == answered:
        return Reading("", unread)
    if not learned:
        raise ValueError("none of its answers is to be learned (`weight: 0` or `train: false`)")
    details = {"messages": messages, "learned": learned, "tools": tools}
    return Reading(json.dumps(details, ensure_ascii=False), unread)


def has_calls(turn: Mapping[str, Any]) -> bool:
    """Whether a turn calls a tool, so that it need not say anything."""
    return any(_says_something(turn.get(name)) for name in CALLS)


def text_of_parts(content: Any) -> Any:
    """The text of a content that is a list of parts, all of them text; any other content as it is.

    Raises:
        ValueError: naming the type of a part that is no text.
    """
    if not isinstance(content, list) or not all(isinstance(part, Mapping) and "type" in part for part in content):
        return content
    if other := [part["type"] for part in content if part["type"] != "text"]:
        raise ValueError(f"the content has a part of the type {other[0]!r}, and only text is read")
    return "".join(str(part.get("text") or "") for part in content)


def _message(turn: Turn) -> tuple[dict[str, Any], set[str]]:
    """A turn as a chat template takes it, and the names of its fields that mean nothing here."""
    given = {name: value for name, value in turn.more.items() if _says_something(value)}
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    for name in REFUSED:
        if name in given:
            raise ValueError(f"the field `{name}` is not read, and the row would mean something else without it")
    known = {*LEARNED, *REFUSED}
    asked = [name for name in LEARNED if name in given and name != "weight"]
    if asked and turn.role != "assistant":
        raise ValueError(f"the field `{asked[0]}` asks to learn a turn of the role {turn.role!r}, and only answers are")
    if turn.role == "assistant":
        known |= {*REASONING, *CALLS}
        reasoning = next((given[name] for name in REASONING if name in given), None)
        if reasoning is not None:
            if not isinstance(reasoning, str):
                raise ValueError(f"its reasoning is {type(reasoning).__name__}, not a string")
            message |= dict.fromkeys(REASONING, reasoning)  # templates know one name or another
        if calls := _calls(given):
            message["tool_calls"] = calls
    if turn.role == "tool":
        known |= {*OF_TOOLS}
        message |= {name: given[name] for name in OF_TOOLS if name in given}
    return message, set(given) - known


def _is_learned(number: int, turn: Turn) -> bool:
    for name in LEARNED:
        value = turn.more.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # booleans are among them
            raise ValueError(f"turn {number + 1}: the field `{name}` is {value!r}; it must be 0 or 1, true or false")
        if not value:
            return False
    return True


def _calls(given: Mapping[str, Any]) -> list[Any]:
    calls = given.get("tool_calls") or []
    if "function_call" in given:  # the older form, of a single one
        calls = [*calls, {"type": "function", "function": given["function_call"]}]
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("the field `tool_calls` is not a list of calls")
    return [_with_arguments(_without_nulls(call)) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, as templates want them; many files have a string of JSON."""
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not inner.get("name"):
        raise ValueError("the field `tool_calls` has a call without the name of a function")
    if isinstance(inner.get("arguments"), str):
        try:
            inner["arguments"] = json.loads(inner["arguments"] or "{}")
        except ValueError:
            raise ValueError("the field `tool_calls` has arguments that are not JSON") from None
    return call


def _tools(record: Mapping[str, Any]) -> list[Any]:
    tools, name = record.get("tools"), "tools"
    if not _says_something(tools) and _says_something(record.get("functions")):
        tools, name = record["functions"], "functions"
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            raise ValueError(f"the field `{name}` is a string that is not JSON") from None
    if not _says_something(tools):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"the field `{name}` is not a list of tools")
    tools = [_without_nulls(tool) for tool in tools]
    return [{"type": "function", "function": tool} for tool in tools] if name == "functions" else tools


def _without_nulls(value: Any) -> Any:
    """Without the fields that a table adds to make all its rows alike."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def unread_columns(columns: Iterable[str], read: Iterable[str]) -> set[str]:
    """The names of columns that neither the format nor anything else reads."""
    return set(columns) - {*read, *OF_RECORDS}
