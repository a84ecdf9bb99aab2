"""Killed runs, in one and two processes, with refinement on: continued, they end with the bits of a whole one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from mortal import Moment, Run, same
from test_refine import refine_flags

LONG = ("--trainer.max_epochs=3", "--checkpoint.every_n_steps=1")
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4")
SHARDED = ("--config=configs/strategies/fsdp2.yaml", "--trainer.callbacks=null", "--data.batch_size=4")
KILL = -signal.SIGKILL


def chain(flags: list[str], folder: Path, moments: list[Moment], processes: int = 1) -> None:
    """A whole run beside one that dies at each of these moments in turn; both leave the same."""
    whole = Run(refine_flags(flags, folder / "whole"), folder / "whole.log", processes)
    assert whole.wait() == [0] * processes, whole.text()
    dying = refine_flags(flags, folder / "killed")
    for moment in moments:
        run = Run(dying, folder / "killed.log", processes, moment)
        ends = run.wait()
        assert ends[moment.rank or 0] == -moment.number, f"{moment} {ends}: {run.text()}"
        assert 0 not in ends, f"{moment} {ends}: {run.text()}"
    run = Run(dying, folder / "killed.log", processes)
    assert run.wait() == [0] * processes, run.text()
    same(folder / "whole", folder / "killed")


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


def test_kills_at_every_kind_of_moment_change_no_bit(flags, tmp_path):
    chain([*flags, *LONG], tmp_path, IN_TURN)


def test_a_process_of_two_that_dies_brings_the_other_down(flags, tmp_path):
    chain([*flags, *LONG, *TWO], tmp_path, [Moment("generation", rank=1), Moment("half a checkpoint", 3, rank=0)], 2)
    assert "another process of the run has ended" in (tmp_path / "killed.log").read_text()


@pytest.mark.slow
def test_kills_of_one_process_of_two_change_no_bit(flags, tmp_path):
    written = ("checkpoint", "responses", "weights", "policy")  # by the first process alone
    moments = [
        moment._replace(rank=None if "checkpoint" == moment.name else rank)
        for moment in IN_TURN
        for rank in ((0,) if any(name in moment.name for name in written) else (0, 1))
    ]
    chain([*flags, *LONG, *TWO], tmp_path, moments, 2)


@pytest.mark.slow
def test_kills_of_a_sharded_run_change_no_bit(flags, tmp_path):
    moments = [m for m in IN_TURN if m.name not in ("generation", "half the responses", "responses")]
    chain([*flags, *LONG, *SHARDED], tmp_path, [moment._replace(rank=0) for moment in moments], 2)


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
        run = Run(refine_flags(flags, folder), folder.with_suffix(".log"), processes)
        if done < kills:
            killed(run, folder, 0 if done == 0 else chance.randint(1, most), chance.uniform(0, 0.3))
        ends = run.wait()
        if not any(ends):
            return done
        assert KILL in ends, run.text()
        done += 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_kills_at_random_change_no_bit(flags, tmp_path, processes):
    flags = [*flags, *LONG, *(TWO if processes == 2 else ())]
    whole = Run(refine_flags(flags, tmp_path / "whole"), tmp_path / "whole.log", processes)
    assert whole.wait() == [0] * processes, whole.text()
    seed = int(os.environ.get("KILL_SEED", 0))
    assert survive(flags, tmp_path / "killed", 3, 14, seed, processes) > 0
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_change_no_bit(flags, tmp_path, processes):
    flags = [*flags, *LONG, *(TWO if processes == 2 else ())]
    whole = Run(refine_flags(flags, tmp_path / "whole"), tmp_path / "whole.log", processes)
    assert whole.wait() == [0] * processes, whole.text()
    kills = 0
    for seed in range(100, 120):
        if kills < 20:
            kills += survive(flags, tmp_path / str(seed), 20 - kills, 4, seed, processes)
            same(tmp_path / "whole", tmp_path / str(seed))
    assert kills >= 20


# ---- signals to two processes ----


def test_sigterm_to_one_process_of_two_ends_both_in_a_checkpoint(flags, tmp_path):
    flags = [*flags, *TWO, "--trainer.max_epochs=2"]
    whole = Run(refine_flags(flags, tmp_path / "whole"), tmp_path / "whole.log", 2)
    assert whole.wait() == [0, 0], whole.text()
    stopped = refine_flags(flags, tmp_path / "stopped")
    for moment in (
        Moment("forward", 3, rank=1, number=signal.SIGTERM),
        Moment("forward", 5, rank=0, number=signal.SIGTERM),
    ):
        run = Run(stopped, tmp_path / "stopped.log", 2, moment)
        assert run.wait() == [128 + signal.SIGTERM] * 2, run.text()
    run = Run(stopped, tmp_path / "stopped.log", 2)
    assert run.wait() == [0, 0], run.text()
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("target", ["first", "second"])
def test_processes_that_lightning_launched(flags, tmp_path, number, target):
    """Only the first process was started here, so its exit status is what a user sees."""
    folder = tmp_path / "run"
    arguments = refine_flags([*flags, *LONG, *TWO], folder, "--trainer.max_epochs=50")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(
            [sys.executable, "-m", "lit_bilevel", "fit", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
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
            assert "another process of the run has ended" in text or "terminated with code -9" in text
        end = time.monotonic() + 60
        while Path(f"/proc/{second}").exists() and "Z" not in Path(f"/proc/{second}/stat").read_text():
            assert time.monotonic() < end, "the second process outlived the first"
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
