"""Judges whether new answers are better than the old ones they would replace, by questions that have both.

Let c be how far an answer agrees with the others to its question. Of the answers that agree by c or more,

    a = P(new is right)            Σ n_k r_k / Σ n_k over agreements k ≥ c: n_k answers to the chosen questions, and
                                   r_k of those to the monitor's questions, which the policy never trained on, that say
                                   what the trusted answer says
    b = P(new says what the old answer says)        on the chosen questions
    P(old is right) ≈ b / a        an old answer that is right is repeated as often as a right one is given

Chosen questions are harder than trusted ones, and a policy that does not know agrees less with itself: by r_k answers
count as right as others that agree as far, and not as trusted ones in the mean.

Answers count from the c by which most questions gain: (a − b/a) times how many questions have such answers is largest.
Where it is above 0 for none, the round is left out. One question is added to each side, on which the new answer fails
and the old one is repeated, so that a few lucky answers prove nothing.

Example: of the answers that agree 60 % are right, of the others 10 %; half of the answers to chosen questions agree,
and old ones are repeated by 20 % of those and by 10 % of all. Then a is 0.60 or 0.35 and b/a 0.33 or 0.29, the gain
0.27 for half of the questions or 0.06 for all: only answers that agree count.

Left out: log-probabilities under the policy, for its own samples are likely whatever they say; and that answers which
agree as far may be wrong more often where questions are harder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lit_bilevel.errors import UserError
from lit_bilevel.refinement.alike import Alike, SameAnswer, agreement

Compared = list[tuple[float, bool]]
"""Agreement of each usable new answer to a question, and whether it says what the known answer says."""


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
    fewest: int = 0
    """How many of them there must be at least."""

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
        fewest: of them that must have an answer agreeing as far, for that agreement to be judged by them alone.
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
        known = sum(bool(question) for question in trusted)
        if known < self.fewest:
            return Verdict(
                None,
                f"{known} of the monitor's {len(monitor)} questions have an answer that ended by itself, fewer than"
                f" {self.fewest}, so the new answers cannot be judged; raise `sampling.max_new_tokens`",
                0.0,
                1.0,
            )
        best: tuple[float, Verdict] | None = None
        for least in sorted({agreed for question in pool for agreed, _ in question}):
            a, judged = self._right(pool, trusted, least)
            if judged == 0:
                continue  # no trusted question has answers that agree as little, or as far
            b, answered = _repetition(pool, least, 1.0, extra=1)
            old = min(1.0, b / a) if a > 0 else 1.0
            gain = answered * (a - old)
            # b above a says nothing of how many old answers are right, only that they are no worse than the new ones
            rest = f"old ones in about {old:.0%}" if b < a else f"and repeat the old ones as often ({b:.0%})"
            said = f"new answers are right in about {a:.0%} (judged by {judged} trusted questions), {rest}"
            shared = f"agree with {least:.0%} of the others or more" if least > 0 else "are usable"
            verdict = Verdict(least, f"{said}: those that {shared} count", a, old)
            if best is None or gain > max(best[0], 0.0):
                best = gain, verdict if gain > 0 else Verdict(None, said, a, old)
        if best is not None:
            return best[1]
        ended = any(pool)
        told = "no trusted question has answers that agree as far" if ended else "no new answer ended by itself"
        return Verdict(None, told, 0.0, 1.0)

    def _right(self, pool: list[Compared], trusted: list[Compared], least: float) -> tuple[float, int]:
        """a of the module's docstring, and by how many of the monitor's questions it was told at most."""
        counts = Counter(agreed for question in pool for agreed, _ in question if agreed >= least)
        told = {agreed: self._right_at(trusted, agreed) for agreed in counts}
        right = sum(count * told[agreed][0] for agreed, count in counts.items())
        return right / counts.total(), max(known for _, known in told.values())

    def _right_at(self, trusted: list[Compared], agreed: float) -> tuple[float, int]:
        """r_k of the module's docstring, and by how many of the monitor's questions it was told."""
        share, known = 0.0, 0
        for lowest in sorted({k for question in trusted for k, _ in question if k <= agreed}, reverse=True):
            share, known = _repetition(trusted, lowest, agreed, extra=0)
            if known >= self.fewest:
                break  # else those that agree less count, too: they are right less often
        return share, known

    def _compare(self, answered: Answered) -> Compared:
        agreements = self.agreement(answered.new)
        pairs = zip(agreements, answered.new, strict=True)
        return [(agreed, self.alike.same(text, answered.known)) for agreed, text in pairs if text is not None]


def _repetition(questions: Sequence[Compared], least: float, most: float, extra: int) -> tuple[float, int]:
    """Mean over questions of how many of their answers that agree so far repeat the known one; and how many questions
    have such answers. One question more has the mean `extra`.
    """
    means = []
    for question in questions:
        counted = [repeated for agreed, repeated in question if least <= agreed <= most]
        if counted:
            means.append(sum(counted) / len(counted))
    return (sum(means) + extra) / (len(means) + 1), len(means)
