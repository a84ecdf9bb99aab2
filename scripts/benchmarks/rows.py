"""A large pool against a small one: start-up with a cold and a warm cache, memory, and the time of a policy step.

    python scripts/benchmark.py rows [--rows 10000 1000000] [--num_proc 2] [--steps 40] [--rounds 5] [--folder DIR]

Rows are synthetic: a question and an answer of random words. Start-up is `setup` of the data module, in a process of
its own, whose memory is watched ten times a second: `private` is what it holds itself, with its children; pages of the
memory map, which the system takes back when it needs them, come on top in `resident`. Steps of both pools alternate in
one process and are paired: the ratio is of medians in a round, and the median over rounds counts. A step draws its
rows, reads and collates them, and trains a small Llama and the weights (`OneStep`). Left out: the end of an epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "lit_bilevel" / "toy"
WORDS = (2, 8)
"""Fewest and most words of a text."""


def main(arguments: list[str] | None = None) -> int:
    """Print one line a pool, and the ratio of step times; the status is 1 where it is off by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs=2, type=int, default=[10_000, 1_000_000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--num_proc", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=40, help="steps of each pool in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--folder", help="where files and cache lie; by default a temporary folder")
    parser.add_argument("--start_up", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.start_up:
        print(json.dumps(start_up(options, options.start_up)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options.folder = str(folder)
        shutil.rmtree(folder / "cache", ignore_errors=True)  # of an earlier call, or no start would be cold
        write_rows(folder / "validation.jsonl", 400, seed=1)
        print("| rows | cache | start-up, s | CPU, s | private, MB | resident, MB | cache on disk, MB |")
        print("|---|---|---|---|---|---|---|")
        for rows in options.rows:
            write_rows(folder / f"{rows}.jsonl", rows, seed=0)
            for cache in ("cold", "warm"):
                print(f"| {rows:,} | {cache} | {measured_start_up(options, rows)} |", flush=True)
        seconds, ratios = step_times(options)
        for rows, own in zip(options.rows, seconds, strict=True):
            print(f"{rows:,} rows: {1000 * statistics.median(own):.2f} ms a step (median of {len(own)})", flush=True)
        ratio = statistics.median(ratios)
        print(f"step time, large / small: {ratio:.3f} ({min(ratios):.3f}–{max(ratios):.3f} over {len(ratios)} rounds)")
    return int(abs(ratio - 1) > 0.05)


def write_rows(path: Path, rows: int, seed: int) -> None:
    """A jsonl file of random words; nothing if it is there already."""
    if path.exists():
        return
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(1000)]
    with path.open("w") as file:
        for i in range(rows):
            prompt, response = (" ".join(draw.choices(words, k=draw.randint(*WORDS))) for _ in range(2))
            record = {"id": f"{path.stem}-{i}", "prompt": f"{path.stem} {i} {prompt}", "response": response}
            file.write(json.dumps(record | {"source": f"s{i % 5}"}) + "\n")


# ---- start-up ----


def measured_start_up(options: argparse.Namespace, rows: int) -> str:
    """Cells of the table: start-up in a fresh process."""
    command = [sys.executable, __file__, "--start_up", str(rows), "--folder", options.folder]
    command += ["--num_proc", str(options.num_proc)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    cells = [f"{figures[name]:.1f}" for name in ("seconds", "cpu")]
    return " | ".join([*cells, *(f"{figures[name]:.0f}" for name in ("private", "resident", "disk"))])


def start_up(options: argparse.Namespace, rows: str) -> dict[str, float]:
    """Seconds of `setup`, by the clock and of all processes' computing, and the most memory above that at its start."""
    data = datamodule(options, int(rows))
    watch = MemoryWatch()
    with watch:
        started, computed = time.perf_counter(), sum(os.times()[:4])
        data.setup()
        seconds, cpu = time.perf_counter() - started, sum(os.times()[:4]) - computed
    files = [file for file in (Path(options.folder) / "cache").rglob("*") if file.is_file()]
    disk = sum(file.stat().st_size for file in files if rows_in(file.parent) == int(rows)) / 2**20
    return {"seconds": seconds, "cpu": cpu, "private": watch.private, "resident": watch.resident, "disk": disk}


def rows_in(folder: Path) -> int:
    """Rows of the pool that a prepared set is of; 0 for other folders."""
    about = folder / "about.json"
    names = list(json.loads(about.read_text())["formats"]) if about.is_file() else []
    return int(Path(names[0]).stem) if names and Path(names[0]).stem.isdigit() else 0


class MemoryWatch:
    """Follows the memory of this process and its children (MB), on Linux."""

    def __init__(self) -> None:
        self.private = self.resident = 0.0
        self._done = threading.Event()

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        start: tuple[float, float] | None = None
        while True:
            private, resident = self._now()
            start = start or (private, resident)
            self.private = max(self.private, private - start[0])
            self.resident = max(self.resident, resident - start[1])
            if self._done.wait(0.1):
                return

    @staticmethod
    def _now() -> tuple[float, float]:
        private = resident = 0.0
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for number in ("self", *children):
            try:
                lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has ended
                continue
            sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
            private += int(sizes["Private_Dirty"]) / 1024
            resident += int(sizes["Pss"]) / 1024
        return private, resident


# ---- steps ----


def step_times(options: argparse.Namespace) -> tuple[list[list[float]], list[float]]:
    """Seconds of the steps of each pool, and the ratio of medians in each round."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(treespec|does not have many workers).*")
    runs = [Run(options, rows) for rows in options.rows]
    for run in runs:
        for _ in range(10):
            run.step()
    seconds: list[list[float]] = [[] for _ in runs]
    ratios = []
    for _ in range(options.rounds):
        own: list[list[float]] = [[] for _ in runs]
        for _ in range(options.steps):
            for run, times in zip(runs, own, strict=True):
                times.append(run.step())
        ratios.append(statistics.median(own[1]) / statistics.median(own[0]))
        for times, new in zip(seconds, own, strict=True):
            times += new
    return seconds, ratios


class Run:
    """A Trainer in the middle of an epoch, whose steps are asked for one by one from another thread."""

    def __init__(self, options: argparse.Namespace, rows: int):
        import torch
        from lightning.pytorch import Callback, Trainer

        from lit_bilevel import LitBilevel, OneStep, PolicySettings, SoftmaxWeights

        go, done = threading.Semaphore(0), threading.Semaphore(0)

        class Turns(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                done.release()
                go.acquire()

        self.go, self.done = go, done
        torch.manual_seed(0)
        module = LitBilevel(PolicySettings(str(TOY / "model")), SoftmaxWeights(), OneStep())
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[Turns()],
        )
        thread = threading.Thread(target=trainer.fit, args=(module, datamodule(options, rows)), daemon=True)
        thread.start()
        done.acquire()

    def step(self) -> float:
        """Seconds of the next step: its rows drawn, read, collated and trained on."""
        start = time.perf_counter()
        self.go.release()
        self.done.acquire()
        return time.perf_counter() - start


def datamodule(options: argparse.Namespace, rows: int) -> Any:
    """The data module of a pool; it prepares its sets in the folder's `cache`."""
    from lit_bilevel import BilevelDataModule

    folder = Path(options.folder)
    return BilevelDataModule(
        str(folder / f"{rows}.jsonl"),
        str(folder / "validation.jsonl"),
        tokenizer=str(TOY / "model"),
        batch_size=options.batch_size,
        max_length=256,
        cache=str(folder / "cache"),
        num_proc=options.num_proc,
    )


if __name__ == "__main__":
    sys.exit(main())
