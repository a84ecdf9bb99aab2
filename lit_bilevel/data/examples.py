"""Reads the rows of a table as examples when they are asked for, so that a step costs the same at any size.

Left out: the order of training, which is the stream's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from lit_bilevel.types import PADDING_ROW, Example, Question

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


class Window:
    """One process's examples of one level in a policy step.

    No dataclass, for Lightning would walk into it token by token.

    Args:
        examples: the process's share.
        rows: rows of the level in the whole step, over all processes.
    """

    def __init__(self, examples: list[Example], rows: int):
        self.examples = examples
        self.rows = rows


class Examples:
    """The rows of a table as examples, read from its memory map when they are asked for.

    Args:
        table: rows with their token ids.
        sources: the number of each source's name; others have −1.
        pairs: whether the rows are preference pairs and both answers are wanted.
    """

    def __init__(self, table: Dataset, sources: Mapping[str, int], pairs: bool = False):
        names = ["source", "input_ids", "response_start", "earlier", *(["rejected_ids"] if pairs else [])]
        self.table = table.select_columns(names)
        self.sources = sources

    def __call__(self, rows: Sequence[int]) -> list[Example]:
        """The examples at these positions."""
        columns = self.table[list(rows)]
        values = zip(rows, *(columns[name] for name in columns), strict=True)
        return [
            Example(row, self.sources.get(source, -1), ids, start, None, earlier, *rejected)
            for row, source, ids, start, earlier, *rejected in values
        ]


class Batches(Generic[Item]):
    """Batches that are made when they are asked for, as many on every process.

    No `DataLoader`, for Lightning would deal the batches of each process out to all of them once more (under
    `overfit_batches` also those of a loader whose sampler says that this is done).

    Args:
        make: the batch of this number.
        count: how many there are.
    """

    def __init__(self, make: Callable[[int], Item], count: int):
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, range(self.count))


class EvaluationWindows:
    """Every row of a set once, dealt out to the processes: the shortest first, the same number on each.

    Args:
        examples: the set.
        length_N: [N] tokens of each row.
        size: rows of a window.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, examples: Examples, length_N: np.ndarray, size: int, rank: int, world_size: int):
        order = np.argsort(length_N, kind="stable")
        each = -(-len(order) // world_size)
        self.rows = order[rank::world_size]
        self.fillers = each - len(self.rows)
        self.shortest = int(order[0])
        self.examples, self.size, self.total = examples, size, len(order)

    def __len__(self) -> int:
        return -(-(len(self.rows) + self.fillers) // self.size)

    def __call__(self, index: int) -> Window:
        """The window of this number; one without a row of its own is filled up with padding."""
        start, stop = index * self.size, (index + 1) * self.size
        own = self.examples(self.rows[start:stop].tolist())
        missing = min(stop, len(self.rows) + self.fillers) - start - len(own)
        filler = [replace(self.examples([self.shortest])[0], row=PADDING_ROW)] * missing if missing else []
        return Window(own + filler, self.total)


def question_batches(questions: list[Question], size: int, rank: int, world_size: int) -> Batches[list[Question]]:
    """This process's share of questions, in as many batches as every other has; the last ones may be empty."""
    own = questions[rank::world_size]
    count = math.ceil(math.ceil(len(questions) / world_size) / size)
    return Batches(lambda number: own[number * size : (number + 1) * size], count)


def questions_of(table: Dataset) -> list[Question]:
    """The prompts of a set, the shortest first, with their ids as they are in training."""
    columns = [table[name][:] for name in ("id", "prompt", "input_ids", "response_start")]
    questions = [
        Question(position, id, prompt, ids[:start])
        for position, (id, prompt, ids, start) in enumerate(zip(*columns, strict=True))
    ]
    return sorted(questions, key=lambda question: (len(question.prompt_ids), question.row))
