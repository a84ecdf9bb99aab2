"""What a record means: the columns of a file turned into a prompt and a response.

One small class a format; `detect` chooses by the columns that are there. Left out for now: chat logs and preference
pairs, which need more than one string a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any


class Format(ABC):
    """Reads one kind of record."""

    name: str
    required: tuple[str, ...]

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and response of a record.

        Raises:
            ValueError: naming the field that is missing or wrong.
        """


class PromptResponse(Format):
    """Two strings: `prompt` and `response`."""

    name = "prompt_response"
    required = ("prompt", "response")

    def read(self, record: Mapping[str, Any]) -> tuple[str, str]:
        return text_field(record, "prompt"), text_field(record, "response")


FORMATS: tuple[Format, ...] = (PromptResponse(),)


def text_field(record: Mapping[str, Any], name: str) -> str:
    """A non-empty string field.

    Raises:
        ValueError: if the field is missing, not a string, or only white space.
    """
    if name not in record:
        raise ValueError(f"the field `{name}` is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"the field `{name}` is {type(value).__name__}, not a string")
    if not value.strip():
        raise ValueError(f"the field `{name}` is empty")
    return value


def detect(columns: Collection[str]) -> Format | None:
    """The first format whose required columns are all there."""
    return next((known for known in FORMATS if set(known.required) <= set(columns)), None)
