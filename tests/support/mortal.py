"""Runs that die: each is one process or several.

A run can be killed from outside, or sent a signal by itself at a moment that is named in `MOMENTS`.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
import torch

import lit_bilevel.training.checkpoint_io
from lit_bilevel.__main__ import main
from lit_bilevel.callbacks import BilevelCheckpoint, CleanProbability, Export, SelfRefine, scored_prior
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.module import LitBilevel
from lit_bilevel.refinement.responses_file import ResponseFile
from lit_bilevel.scores.parts import PartFiles
from lit_bilevel.weights import TableWeights
from support.processes import start


class Moment(NamedTuple):
    """When a process is sent a signal.

    Args:
        name: a key of `MOMENTS`.
        count: how often it comes by until then.
        rank: of the process; `None` for all of them.
        number: of the signal.
    """

    name: str
    count: int = 1
    rank: int | None = None
    number: int = signal.SIGKILL


def half_saved(save: Callable, checkpoint: Any, file: Any, **settings: Any) -> None:
    save(checkpoint, file, **settings)
    file.truncate(file.tell() // 2)
    file.flush()


def half_appended(append: Callable, own: ResponseFile, records: Any) -> None:
    records = list(records)
    append(own, records[: len(records) // 2])
    with own.path.open("a") as file:
        file.write('{"id": "cut he')


MOMENTS: dict[str, tuple[Any, str, Callable | None]] = {
    # where, and what is done there instead; without that the signal comes before it
    "forward": (LitBilevel, "_log_step", None),
    "step": (LitBilevel, "on_train_batch_start", None),
    "validation": (LitBilevel, "validation_step", None),
    "epoch end": (LitBilevel, "on_train_epoch_end", None),
    "half a checkpoint": (torch, "save", half_saved),
    "checkpoint": (BilevelCheckpoint, "_save_last_checkpoint", None),
    "renamed checkpoint": (lit_bilevel.training.checkpoint_io, "_sync_folder", None),
    "generation": (HFGenerate, "generate", None),
    "half the responses": (ResponseFile, "append", half_appended),
    "responses": (SelfRefine, "_report", None),
    "weights": (Export, "_write_weights", None),
    "policy": (Export, "_write_policy", None),
    "test": (LitBilevel, "test_step", None),
    "part of the scores": (PartFiles, "write", None),
    "scores": (scored_prior, "write_scores", None),
    "prior": (TableWeights, "set_prior", None),
    "closing": (CleanProbability, "close", None),
}


def arm(moment: Moment) -> None:
    """From now on this process is sent the signal when the moment has come so often."""
    owner, name, instead = MOMENTS[moment.name]
    original, seen = getattr(owner, name), 0

    @functools.wraps(original)
    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen != moment.count:
            return original(*arguments, **settings)
        if instead is not None:
            instead(original, *arguments, **settings)
        os.kill(os.getpid(), moment.number)
        return original(*arguments, **settings)

    setattr(owner, name, counted)


def live(arguments: list[str], moment: Moment | None) -> int:
    """A run in a process of its own."""
    if moment is not None and moment.rank in (None, int(os.environ.get("RANK", 0))):
        arm(moment)
    return main(arguments)


def outcome(folder: Path) -> dict[str, bytes | list]:
    """What a run leaves: every byte of the policy and the responses, every number of the weights."""
    found: dict[str, bytes | list] = {
        f"policy/{path.name}": path.read_bytes() for path in sorted((folder / "policy").iterdir())
    }
    found["weights"] = pyarrow.parquet.read_table(folder / "weights.parquet").to_pylist()
    for name in ("responses.jsonl", "metrics.json"):
        if (folder / name).exists():
            found[name] = (folder / name).read_bytes()
    return found


def same(one: Path, other: Path) -> None:
    """Assert that two runs left the same."""
    a, b = outcome(one), outcome(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name


class Run:
    """A run with `--ckpt_path last`, going on in processes of its own.

    Args:
        flags: of `lit-bilevel fit`.
        log: where the processes write.
        processes: how many.
        moment: when one of them, or all, are sent a signal.
    """

    def __init__(self, flags: list[str], log: Path, processes: int = 1, moment: Moment | None = None):
        self.log = log
        self.processes = start(live, (["fit", *flags, "--ckpt_path=last"], moment), [log] * processes)

    def alive(self) -> bool:
        """Whether any process is."""
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()

    def wait(self, timeout: float = 600) -> list[int]:
        """The exit codes; negative numbers of signals."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        assert not hanging, f"processes {hanging} hang:\n{self.text()}"
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def text(self) -> str:
        """The end of what the processes wrote."""
        return self.log.read_text()[-3000:]
