"""Killed runs, in one and two processes, with refinement on: continued, they end with the bits of a whole one."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.files import ROOT
from support.killing import run_flags
from support.mortal import Moment, Run, same

EPOCHS = ("--trainer.max_epochs=3",)
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4")
SHARDED = ("--config=configs/strategies/fsdp2.yaml", "--trainer.callbacks=null", "--data.batch_size=4")
KILL = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """Folder of an uninterrupted run with such flags, made once."""
    done: dict[tuple[str, ...], Path] = {}

    def find(more: tuple[str, ...], processes: int) -> Path:
        if more not in done:
            folder = tmp_path_factory.mktemp("whole")
            run = Run(run_flags(small, folder / "run", more), folder / "log", processes)
            assert run.wait() == [0] * processes, run.text()
            done[more] = folder / "run"
        return done[more]

    return find


def chain(small, whole, folder: Path, more: tuple[str, ...], moments: list[Moment], processes: int = 1) -> str:
    """Let a run die at each of these moments in turn, compare it with a whole one, and return what it wrote."""
    flags = run_flags(small, folder / "killed", more)
    log = folder / "log"
    for moment in moments:
        run = Run(flags, log, processes, moment)
        ends = run.wait()
        assert ends[moment.rank or 0] == -moment.number, f"{moment} {ends}: {run.text()}"
        assert 0 not in ends, f"{moment} {ends}: {run.text()}"
    run = Run(flags, log, processes)
    assert run.wait() == [0] * processes, run.text()
    same(whole(more, processes), folder / "killed")
    return log.read_text()


# ---- at every kind of moment ----

IN_TURN = [
    Moment("forward", 3),
    Moment("half a checkpoint", 2),
    Moment("checkpoint", 2),
    Moment("renamed checkpoint", 2),
    Moment("validation", 2),
    Moment("epoch end"),
    Moment("generation"),
    Moment("half the responses"),
    Moment("responses"),
    Moment("step", 9),
    Moment("half the responses"),
    Moment("epoch end", 2),
    Moment("weights"),
    Moment("policy"),
    Moment("test"),
]
FEW = [moment for moment in IN_TURN if moment.name in ("half a checkpoint", "epoch end", "generation", "policy")]
FIRST = ("generation", "half the responses", "responses", "checkpoint", "weights", "policy")
"""What the first process does alone, or, with so few rows, has alone to do."""


@pytest.mark.parametrize("moments", [FEW, pytest.param(IN_TURN, marks=pytest.mark.slow)], ids=len)
def test_kills_at_every_kind_of_moment_change_no_bit(small, whole, tmp_path, moments):
    chain(small, whole, tmp_path, EPOCHS, moments)


LOSSES = ("--trainer.callbacks=null", "--model.weights=BMOWeights", "--model.solver=Mixing", "--trainer.max_epochs=1")


@pytest.mark.slow
def test_kills_after_the_last_step_change_no_bit_where_weights_are_scored_then(small, whole, tmp_path):
    chain(small, whole, tmp_path, LOSSES, [Moment(name) for name in ("weights", "policy", "test")])


@pytest.mark.slow
def test_a_process_of_two_that_dies_brings_the_other_down(small, whole, tmp_path):
    moments = [Moment("forward", 16, rank=1), Moment("half a checkpoint", 3, rank=0)]
    text = chain(small, whole, tmp_path, (*TWO, "--trainer.max_epochs=2"), moments, 2)
    assert text.count("another process of the run has ended") == 2
    assert "Traceback" not in text


@pytest.mark.slow
def test_kills_of_one_process_of_two_change_no_bit(small, whole, tmp_path):
    ranks = itertools.cycle((1, 0))
    moments = [
        moment._replace(rank=0 if any(name in moment.name for name in FIRST) else next(ranks)) for moment in IN_TURN
    ]
    chain(small, whole, tmp_path, (*TWO, *EPOCHS), moments, 2)


@pytest.mark.slow
def test_kills_of_a_sharded_run_change_no_bit(small, whole, tmp_path):
    moments = [m._replace(rank=0) for m in IN_TURN if m.name not in ("generation", "half the responses", "responses")]
    chain(small, whole, tmp_path, (*SHARDED, *EPOCHS), moments, 2)


# ---- at random ----


def killed(run: Run, folder: Path, saves: int, delay: float) -> None:
    """Kill a run once it has saved so many checkpoints (0: once it has begun), and a moment more."""
    last, config = folder / "checkpoints" / "last.ckpt", folder / "config.yaml"

    def stamp(path: Path) -> int:
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    seen, begun, count = stamp(last), stamp(config), -1
    while count < saves and run.alive():
        if count < 0 and stamp(config) != begun:
            count = 0
        if stamp(last) != seen:
            seen, count = stamp(last), max(count, 0) + 1
        time.sleep(0.001)
    time.sleep(delay)
    run.kill()


def survive(flags: list[str], folder: Path, kills: int, most: int, seed: int, processes: int = 1) -> int:
    """Run to the end with so many kills on the way; returns how many there were."""
    chance, done = random.Random(seed), 0
    while True:
        run = Run(flags, folder.with_suffix(".log"), processes)
        if done < kills:
            killed(run, folder, 0 if done == 0 else chance.randint(1, most), chance.uniform(0, 0.3))
        ends = run.wait()
        if not any(ends):
            return done
        assert KILL in ends, run.text()
        done += 1


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_at_random_change_no_bit(small, whole, tmp_path, processes, kills):
    more = (*TWO, *EPOCHS) if processes == 2 else EPOCHS
    done, seed = 0, int(os.environ.get("KILL_SEED", 100))
    while done < kills:
        folder = tmp_path / str(seed)
        done += survive(run_flags(small, folder, more), folder, kills - done, 14 if kills == 3 else 4, seed, processes)
        same(whole(more, processes), folder)
        seed += 1


# ---- signals to two processes ----


@pytest.mark.slow
def test_sigterm_to_one_process_of_two_ends_both_in_a_checkpoint(small, whole, tmp_path):
    more = (*TWO, "--trainer.max_epochs=2")
    flags = [flag for flag in run_flags(small, tmp_path / "stopped", more) if "checkpoint.every_n_steps" not in flag]
    moments = (Moment("forward", 3, 1, signal.SIGTERM), Moment("generation", 1, 0, signal.SIGTERM))
    for moment, step in zip(moments, (3, 12), strict=True):
        run = Run(flags, tmp_path / "log", 2, moment)
        assert run.wait() == [128 + signal.SIGTERM] * 2, run.text()
        last = torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == step
    run = Run(flags, tmp_path / "log", 2)
    assert run.wait() == [0, 0], run.text()
    same(whole(more, 2), tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("target", ["first", "second"])
def test_processes_that_lightning_launched_end_together(small, tmp_path, number, target):
    """Only the first process was started here, so its exit status is what a user sees."""
    folder = tmp_path / "run"
    arguments = run_flags(small, folder, (*TWO, "--trainer.max_epochs=50"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_bilevel", "fit", *arguments]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        (second,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
        os.kill(first.pid if target == "first" else second, number)
        status = first.wait(60)
        text = (tmp_path / "log").read_text()
        if number == signal.SIGTERM:
            assert status == 128 + number, text[-3000:]
            assert "stopped after" in text
        elif target == "second":
            assert status != 0
            assert "another process of the run has ended" in text
        end = time.monotonic() + 60
        while is_running(second):
            assert time.monotonic() < end, "the second process outlived the first"
            time.sleep(0.1)
    finally:
        if is_running(second):
            os.killpg(first.pid, signal.SIGKILL)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
