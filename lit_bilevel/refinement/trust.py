"""Judges whether new answers are better than the old ones they would replace, by questions that have both.

Let c be how far an answer agrees with the others to its question. Of the answers that agree by c or more,

    a = P(new says what a trusted answer says)      on the monitor's questions, which the policy never trained on
    b = P(new says what the old answer says)        on the chosen questions
    P(old is right) ≈ b / a        an old answer that is right is repeated as often as a trusted one is

so the new ones are right more often than the old ones where a > b/a, that is where a² > b. Answers count from the least
c for which this holds; where it holds for none, the round is left out. One question is added to each side, on which the
new answer fails and the old one is repeated, so that a few lucky answers prove nothing.

Example: 60 % of the trusted answers are repeated and 20 % of the old ones: about a third of the old ones are right.
A policy that repeats 2 % of both cannot do the task: 0.02² is far below 0.02.

Left out: log-probabilities under the policy, for its own samples are likely whatever they say; and judging questions
one by one, by how hard they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lit_bilevel.errors import UserError
from lit_bilevel.refinement.alike import Alike, SameAnswer, agreement


@dataclass(frozen=True)
class Answered:
    """A question that was answered anew.

    Args:
        known: the answer that there was.
        new: G new ones; `None` for those that cannot be used.
    """

    known: str
    new: tuple[str | None, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a round.

    Args:
        least: agreement from which on new answers count; `None` where none of them do.
        reason: in words, for the run's log.
        new_right: estimated share of right answers among the new ones that count (or all, where none does).
        old_right: the same of the old answers to these questions.
    """

    least: float | None
    reason: str
    new_right: float
    old_right: float


class Trust(ABC):
    """Decides which new answers of a round count."""

    questions: int = 0
    """How many of the monitor's questions are to be answered beside the chosen ones."""

    @abstractmethod
    def agreement(self, answers: Sequence[str | None]) -> list[float]:
        """How far each of the answers to a question agrees with the others, in [0, 1]."""

    @abstractmethod
    def judge(self, chosen: Sequence[Answered], monitor: Sequence[Answered]) -> Verdict:
        """Compare the new answers to the chosen questions with the old ones.

        Args:
            chosen: of the pool, with their old answers.
            monitor: trusted ones.
        """


class Agreed(Trust):
    """Trusts answers on which the policy agrees with itself, as far as that is borne out by the monitor's questions.

    Args:
        alike: when two answers say the same.
        questions: most of the monitor's questions that are answered in a round; they cost what as many rows cost.
        fewest: of them that must have an answer agreeing so far, for that agreement to be judged.
    """

    def __init__(self, alike: Alike | None = None, questions: int = 64, fewest: int = 8):
        for name, value in (("questions", questions), ("fewest", fewest)):
            if value < 1:
                raise UserError(f"`{name}` of `Agreed` is {value}; it must be at least 1.")
        if fewest > questions:
            raise UserError(f"`fewest` of `Agreed` is {fewest} and `questions` {questions}; it cannot be more.")
        self.alike = alike or SameAnswer()
        self.questions, self.fewest = questions, fewest

    def agreement(self, answers: Sequence[str | None]) -> list[float]:
        return agreement(answers, self.alike)

    def judge(self, chosen: Sequence[Answered], monitor: Sequence[Answered]) -> Verdict:
        pool, trusted = ([self._compare(answered) for answered in side] for side in (chosen, monitor))
        first: Verdict | None = None
        for least in sorted({agreed for question in pool for agreed, _ in question}):
            # the question added to each side counts against the new answers: a few lucky ones prove nothing
            a, known = _repetition(trusted, least, extra=0)
            b, _ = _repetition(pool, least, extra=1)
            if known < self.fewest:
                break  # higher agreement is rarer still
            old = min(1.0, b / a) if a > 0 else 1.0
            # b above a says nothing of how many old answers are right, only that they are no worse than the new ones
            rest = f"old ones in about {old:.0%}" if b < a else f"and repeat the old ones as often ({b:.0%})"
            said = f"new answers are right in about {a:.0%} (judged by {known} trusted questions), {rest}"
            if a**2 > b:
                shared = f"agree with {least:.0%} of the others or more" if least > 0 else "are usable"
                return Verdict(least, f"{said}: those that {shared} count", a, old)
            first = first or Verdict(None, said, a, old)
        return first or Verdict(
            None,
            f"fewer than {self.fewest} of the monitor's questions ({len(monitor)}) have an answer that ended by itself,"
            " so the new answers cannot be judged",
            0.0,
            1.0,
        )

    def _compare(self, answered: Answered) -> list[tuple[float, bool]]:
        """Agreement of each usable new answer, and whether it says what the known answer says."""
        agreements = self.agreement(answered.new)
        pairs = zip(agreements, answered.new, strict=True)
        return [(agreed, self.alike.same(text, answered.known)) for agreed, text in pairs if text is not None]


def _repetition(questions: Sequence[Sequence[tuple[float, bool]]], least: float, extra: int) -> tuple[float, int]:
    """Mean over questions of how many of their answers, from an agreement on, repeat the known one; and how many
    questions have such answers. One question more has the mean `extra`.
    """
    means = []
    for question in questions:
        counted = [repeated for agreed, repeated in question if agreed >= least]
        if counted:
            means.append(sum(counted) / len(counted))
    return (sum(means) + extra) / (len(means) + 1), len(means)
