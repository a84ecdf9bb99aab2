"""Several nodes: a run folder of their own each is refused at the start; with one that they share, a node may die."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from support.files import ROOT
from support.killing import run_flags
from support.mortal import Run, same

from lit_bilevel.callbacks.nodes import check_shared
from lit_bilevel.errors import UserError

TWO = ("--trainer.strategy=ddp", "--data.batch_size=4", "--trainer.max_epochs=2")
NODES = (*TWO, "--trainer.devices=1", "--trainer.num_nodes=2")


class Strategy:
    """Of node 1; `folder` is where node 0 writes."""

    root_device = torch.device("cpu")

    def __init__(self, folder: Path):
        self.folder = folder

    def broadcast(self, value: str) -> str:
        self.token = f".seen-by-all-{value}"
        return value

    def barrier(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / self.token).touch()

    def reduce(self, value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "min"
        return value


def test_a_folder_of_each_node_is_told_from_one_of_all(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    trainer = SimpleNamespace(num_nodes=2, is_global_zero=False, strategy=Strategy(one))
    check_shared(trainer, one)
    with pytest.raises(UserError, match=r"other is not the same folder on all 2 nodes.*`trainer.default_root_dir`"):
        check_shared(trainer, other)
    first = SimpleNamespace(num_nodes=2, is_global_zero=True, strategy=Strategy(other))
    check_shared(first, other)
    assert list(other.iterdir()) == []  # nothing stays behind
    check_shared(SimpleNamespace(num_nodes=1), tmp_path / "none")


class Nodes:
    """Two nodes on this machine's loopback, each an agent of torchrun with one process."""

    def __init__(self, flags: list[list[str]], folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.logs = [folder / f"node{rank}.log" for rank in (0, 1)]
        self.agents: list[psutil.Process] = []
        self.started: list[subprocess.Popen] = []
        for rank, own in enumerate(flags):
            command = [sys.executable, "-m", "torch.distributed.run", *place, f"--node_rank={rank}"]
            command += ["-m", "lit_bilevel", "fit", *own, "--ckpt_path=last"]
            with self.logs[rank].open("a") as log:
                agent = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            self.agents.append(psutil.Process(agent.pid))
            self.started.append(agent)

    def wait(self) -> list[int]:
        """The exit codes."""
        try:
            return [agent.wait(600) for agent in self.started]
        finally:
            self.kill(0)
            self.kill(1)

    def kill(self, rank: int) -> None:
        """Let a node be gone: its agent and its process, which has a session of its own."""
        if self.started[rank].poll() is None:
            for process in [*self.agents[rank].children(recursive=True), self.agents[rank]]:
                process.kill()
            self.started[rank].wait()

    def alive(self) -> bool:
        """Whether both nodes are."""
        return all(agent.poll() is None for agent in self.started)

    def text(self, rank: int = 0) -> str:
        """What a node wrote."""
        return self.logs[rank].read_text()


@pytest.mark.slow
def test_two_nodes_equal_one_and_survive_the_death_of_either(small, tmp_path):
    whole = Run(run_flags(small, tmp_path / "whole", (*TWO, "--trainer.devices=2")), tmp_path / "log", 2)
    assert whole.wait() == [0, 0], whole.text()
    flags = [run_flags(small, tmp_path / "nodes", NODES)] * 2
    last = tmp_path / "nodes" / "checkpoints" / "last.ckpt"
    for gone in (1, 0):  # the second time it goes on from where the first was killed
        before = last.stat().st_mtime_ns if last.exists() else 0
        nodes = Nodes(flags, tmp_path)
        while (not last.exists() or last.stat().st_mtime_ns == before) and nodes.alive():
            time.sleep(0.1)
        nodes.kill(gone)
        codes = nodes.wait()
        assert 0 not in codes, nodes.text()
    nodes = Nodes(flags, tmp_path)
    assert nodes.wait() == [0, 0], nodes.text()
    same(tmp_path / "whole", tmp_path / "nodes")


@pytest.mark.slow
def test_nodes_with_folders_of_their_own_are_refused_before_the_first_step(small, tmp_path):
    flags = [run_flags(small, tmp_path / f"own{rank}", NODES) for rank in (0, 1)]
    nodes = Nodes(flags, tmp_path)
    assert 0 not in nodes.wait()
    for rank in (0, 1):
        assert "is not the same folder on all 2 nodes" in nodes.text(rank)
        assert "Traceback" not in nodes.text(rank).split("is not the same folder")[0]
    assert not (tmp_path / "own0" / "checkpoints" / "last.ckpt").exists()
