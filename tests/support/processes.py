"""Processes of runs, started by a fork server that has loaded the libraries, which takes longer than most runs here.

Each is a process of its own, with its own environment and output, and can be killed like any other.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lit_bilevel.cli import BilevelCLI  # noqa: F401  (loaded once, in the server)
from lit_bilevel.policy.load import load_policy  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def start(work: Callable[..., int | None], arguments: tuple, logs: list[Path]) -> list[BaseProcess]:
    """As many processes as there are logs, as torchrun would start them; they end with what `work` returns.

    Args:
        work: a function of a module.
        arguments: its arguments, the same for all.
        logs: where each of them writes, at the end of the file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, log in enumerate(logs):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(logs))}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        own = environment if len(logs) > 1 else {}
        process = server().Process(target=live, args=(work, arguments, own, str(log)))
        process.start()
        processes.append(process)
    return processes


def live(work: Callable[..., int | None], arguments: tuple, environment: dict[str, str], log: str) -> None:
    """A process from beginning to end."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


@functools.cache
def server() -> Any:
    """The fork server; it inherits the environment of its first use."""
    os.environ.update(SETTINGS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
