"""Lightning's DeepSpeed strategy without its question for CUDA, for tests; DeepSpeed itself runs on CPUs, over gloo."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """What is lifted is the check of the accelerator and of device numbers, which a CPU has none of.

    All goes over gloo: DeepSpeed's own operations in shared memory would have to be compiled first, for minutes.
    """

    def __init__(self, **settings: Any):
        os.environ["DS_ACCELERATOR"] = "cpu"
        super().__init__(process_group_backend="gloo", **settings)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_distributed(self) -> None:
        backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute, `torch` is torch itself
        backend.build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()
