"""Says which pool rows and which validation rows meet in which policy step: the training stream.

A pure function of (seed, epoch, step), so a resumed run needs only its position to see the same data. The pool
defines the epoch: a fresh permutation, cut into windows of nearly equal size so that none is left with a single row,
whose score could not be compared; where windows have 2 rows and the pool an odd number, one of them has 3.
Validation rows come from an endless chain of permutations of their own.

Left out: sampling pool rows by weight; every row is visited once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lit_bilevel.data.collate import share_of_rank
from lit_bilevel.data.examples import Examples, Window

Item = TypeVar("Item")


@dataclass(frozen=True)
class Schedule:
    """Which rows a policy step sees.

    Args:
        pool_rows: N.
        upper_rows: rows of the upper level.
        window: pool rows of a policy step, over all processes.
        upper_window: validation rows of a policy step, over all processes.
        seed: seed of both orders.
    """

    pool_rows: int
    upper_rows: int
    window: int
    upper_window: int
    seed: int

    @property
    def steps(self) -> int:
        """Policy steps in an epoch."""
        # the second bound leaves no window with one row alone: its score would have none to be compared with
        return max(1, min(-(-self.pool_rows // self.window), self.pool_rows // min(self.window, 2)))

    def lower(self, epoch: int, step: int) -> list[int]:
        """Pool rows of a step."""
        # sizes differ by one row at most; with a short window at the end, its few rows would count for a whole step
        start, stop = (self.pool_rows * (step + i) // self.steps for i in (0, 1))
        return _pool_order(self.pool_rows, self.seed, epoch)[start:stop].tolist()

    def upper(self, position: int) -> list[int]:
        """Validation rows of the step `position`, counted from the start of the run."""
        # by the steps of the run and not of the epoch: a chain that began anew with the pool would show the first
        # validation rows more often than the last, and always beside the same pool rows
        first = position * self.upper_window
        rows = []
        for i in range(first, first + self.upper_window):
            turn, offset = divmod(i, self.upper_rows)
            rows.append(int(_upper_order(self.upper_rows, self.seed + 1, turn)[offset]))
        return rows


def _permutation(size: int, seed: int, turn: int) -> torch.Tensor:
    # a generator of its own, so that nothing else that draws can change the order; seeds are far enough apart that
    # the orders of two of them coincide in no run
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    return torch.randperm(size, generator=generator)


# apart, for a step that takes a short validation set many times would push the pool's order out
_pool_order, _upper_order = lru_cache(maxsize=2)(_permutation), lru_cache(maxsize=2)(_permutation)


class StepMaker:
    """Makes this process's windows of a policy step.

    Args:
        schedule: which rows each step sees.
        sets: the examples of each level.
        rank: this process.
        world_size: number of processes.
        repeat_first_epoch: every epoch is the first one (for `overfit_batches`).
    """

    def __init__(
        self, schedule: Schedule, sets: dict[str, Examples], rank: int, world_size: int, repeat_first_epoch: bool
    ):
        self.schedule, self.sets = schedule, sets
        self.rank, self.world_size = rank, world_size
        self.repeat_first_epoch = repeat_first_epoch

    def __call__(self, epoch: int, step: int, position: int) -> dict[str, Window]:
        if self.repeat_first_epoch:
            epoch, position = 0, step
        rows = {"lower": self.schedule.lower(epoch, step), "upper": self.schedule.upper(position)}
        return {level: self._window(self.sets[level], rows[level]) for level in rows}

    def _window(self, examples: Examples, rows: list[int]) -> Window:
        # the number of all rows goes along: losses are divided by it, so a process count changes no step
        return Window(share_of_rank(examples(rows), self.rank, self.world_size), len(rows))


class _Steps(Dataset):
    """Makes the windows of one policy step from its address (epoch, step, position)."""

    def __init__(self, make: Callable[[int, int, int], dict[str, Window]]):
        self.make = make

    def __getitem__(self, address: tuple[int, int, int]) -> dict[str, Window]:
        return self.make(*address)


def pass_on(item: Item) -> Item:
    """What it is given: loaders here collate nothing."""
    return item


class PairedStream:
    """An epoch of policy steps; iterating again gives the next one. Its whole state is `position`.

    Args:
        make: batches of both levels for (epoch, step in the epoch, steps since the start of the run).
        steps: policy steps in a full epoch.
        epoch_steps: returns the steps that are run in an epoch (fewer under `limit_train_batches`); asked when the
            first batch is drawn, because Lightning creates the iterator before it restores its own position.
        num_workers: worker processes that read.
    """

    def __init__(
        self,
        make: Callable[[int, int, int], dict[str, Window]],
        steps: int,
        epoch_steps: Callable[[], int],
        num_workers: int = 0,
    ):
        self.make = make
        self.steps = steps
        self.epoch_steps = epoch_steps
        self.num_workers = num_workers
        self.position = 0

    def __len__(self) -> int:
        return self.steps

    def state_dict(self) -> dict[str, int]:
        """The position: policy steps drawn since the start of the run."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position."""
        self.position = state_dict["position"]

    def __iter__(self) -> Iterator[dict[str, Window]]:
        # under `limit_train_batches` an epoch is that much shorter, and the position is counted in such epochs
        steps = min(self.steps, self.epoch_steps())
        epoch, start = divmod(self.position, steps)
        loader = DataLoader(
            _Steps(self.make),
            batch_size=None,  # an item is a whole policy step, with both levels of it
            collate_fn=pass_on,
            sampler=[(epoch, step, epoch * steps + step) for step in range(start, steps)],
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),  # its own, or drawing a seed would shift dropout
        )
        for batch in loader:
            self.position += 1  # counts as done for a checkpoint at the end of this step
            yield batch
