"""Tells when two answers say the same, and how far the answers to one question agree (arXiv 2203.11171).

    agreement of an answer = share of the other G − 1 answers to its question that say the same

Answers drawn independently from the policy make this an unbiased estimate of the probability that the policy gives to
what the answer says, however it says it. Counting an answer among those that agree with it would add 1/G to everyone.

    #### 42    The answer is 42.    \\boxed{42}    42.0    all say the same under `SameAnswer`

Left out: a model that judges whether two texts mean the same; `Alike` is the socket for one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from lit_bilevel.errors import UserError

MARKED = re.compile(r"####\s*(.+)|\\boxed\{([^{}]*)\}|\b(?:final )?answer is:?\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?|[-−]?\.\d+")
WORD = re.compile(r"\w+")
TOKEN = re.compile(rf"{NUMBER.pattern}|\w+|[^\w\s.,;:!?'\"()]")


class Alike(ABC):
    """Says whether two answers to one question say the same."""

    @abstractmethod
    def same(self, one: str, other: str) -> bool:
        """Whether they do; the order does not matter."""


class SameAnswer(Alike):
    """The same final answer where one is marked (`####`, `\\boxed{}`, "the answer is"), else the same text: numbers by
    their value, words without case, punctuation and white space.
    """

    def same(self, one: str, other: str) -> bool:
        return _normalise(final(one)) == _normalise(final(other))


class SameNumber(Alike):
    """The same last number, whatever stands around it; texts without one as under `SameAnswer`."""

    def same(self, one: str, other: str) -> bool:
        numbers = [NUMBER.findall(final(text)) for text in (one, other)]
        if all(numbers):
            return _value(numbers[0][-1]) == _value(numbers[1][-1])
        return not any(numbers) and _normalise(final(one)) == _normalise(final(other))


class SharedWords(Alike):
    """So many words in common, for answers in open text: F1 of the two bags of words.

    Args:
        least: F1 from which on two answers count as saying the same.
    """

    def __init__(self, least: float = 0.5):
        if not 0 < least <= 1:
            raise UserError(f"`least` of `SharedWords` is {least}; it must be in (0, 1].")
        self.least = least

    def same(self, one: str, other: str) -> bool:
        bags = [Counter(WORD.findall(text.casefold())) for text in (one, other)]
        total = sum(sum(bag.values()) for bag in bags)
        shared = sum((bags[0] & bags[1]).values())
        return one.split() == other.split() if total == 0 else 2 * shared / total >= self.least


def agreement(answers: Sequence[str | None], alike: Alike) -> list[float]:
    """For each answer to a question the share of the others that say the same.

    Args:
        answers: G answers; `None` for those that cannot be used, which agree with nothing and count among the others.
        alike: when two say the same.

    Returns:
        G shares; of the only answer to a question 1, for nothing speaks against it.
    """
    others = len(answers) - 1
    if others == 0:
        return [0.0 if answers[0] is None else 1.0]
    counts = [0] * len(answers)
    for i, one in enumerate(answers):
        for j, other in enumerate(answers[:i]):
            if one is not None and other is not None and alike.same(one, other):
                counts[i] += 1
                counts[j] += 1
    return [count / others for count in counts]


def final(text: str) -> str:
    """The answer that a text marks as its last word, or all of it."""
    marked = [next(part for part in match.groups() if part is not None) for match in MARKED.finditer(text)]
    return marked[-1] if marked else text


def _normalise(text: str) -> tuple[str | float, ...]:
    """Numbers by value, words, and signs that are no punctuation, in their order."""
    parts = [match.group() for match in TOKEN.finditer(text.casefold())]
    return tuple(_value(part) if NUMBER.fullmatch(part) else part for part in parts) or (text.strip(),)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))
