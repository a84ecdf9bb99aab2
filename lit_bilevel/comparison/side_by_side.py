"""Runs of a comparison side by side, each in a process of its own.

    run_side_by_side(runner, ["mixing", "one_step", "weighted:one_step"], seeds=[0, 1], jobs=2)

A run begins when a process is free and the run that it needs is there. On the CPU the processes share the threads; on
CUDA each sees one of the visible devices, in turn. A run's `seconds` are those beside the others.

Left out: several processes for one run; a job is one process on one device.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.sharedctypes
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from lit_bilevel.comparison.methods import runs_behind
from lit_bilevel.comparison.results import Result
from lit_bilevel.comparison.run import Runner

Run = tuple[str, int]
"""A method and a seed."""


def run_side_by_side(runner: Runner, methods: Sequence[str], seeds: Sequence[int], jobs: int) -> dict[Run, str]:
    """Add the missing rows of the runs behind some methods to the results.

    Args:
        runner: of the comparison.
        methods: rows of its table; for one that is the best of others, these are run.
        seeds: one run of each method for each.
        jobs: how many runs at a time.

    Returns:
        Why a run is not there, for those that failed and those that needed one of them.
    """
    needed = {name: needs for method in methods for name, needs in runs_behind(method, runner.variants).items()}
    waiting = {(name, seed): needs for seed in seeds for name, needs in needed.items()}
    waiting = {run: needs for run, needs in waiting.items() if runner.results.find(*run) is None}
    running: dict[Future[Result], Run] = {}
    failed: dict[Run, str] = {}
    # spawned, not forked: a copy of a process whose threads hold locks may hang
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, context, _begin, (number, _threads(jobs))) as processes:
        while waiting or running:
            for run, needs in list(waiting.items()):
                if needs and (needs, run[1]) in failed:
                    failed[run] = f"{needs}, which it needs, failed"
                    del waiting[run]
                elif len(running) < jobs and (not needs or runner.results.find(needs, run[1])):
                    del waiting[run]
                    try:
                        running[processes.submit(_row, runner, *run)] = run
                    except BrokenProcessPool:
                        failed[run] = "no process was left to run it"
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(done)
                try:
                    runner.results.add(done.result())
                except BrokenProcessPool:
                    failed[run] = "a process was killed from outside (was there memory for so many jobs?)"
                except Exception as error:  # of any library: one method must not cost the night of the others
                    failed[run] = f"{type(error).__name__}: {error}"
    return failed


def _threads(jobs: int) -> int:
    return max(1, torch.get_num_threads() // jobs)


def _begin(number: multiprocessing.sharedctypes.Synchronized[int], threads: int) -> None:
    """Give a new process its part of the machine."""
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    torch.set_num_threads(threads)
    if (devices := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(device) for device in range(devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[own % len(names)]


def _row(runner: Runner, name: str, seed: int) -> Result:
    """A run, in a process of the pool."""
    try:
        return runner.make_row(name, seed)  # the process that started this one writes the results
    except SystemExit as error:  # a refused setting; it would end the process of the pool
        raise RuntimeError(f"it was refused; {runner.results.run_folder(name, seed) / 'log.txt'} says why") from error
