"""Shared fixtures: small slices of the toy data, and a trainer that is quiet and quick."""

from __future__ import annotations

import math
import os
import time

import pytest
import torch
from support.files import ROOT, TOY, read_jsonl, write_jsonl

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--accelerator", choices=("gpu", "cpu"), default="gpu", help="of the tests marked `gpu`")
    parser.addoption("--seconds", type=float, default=math.inf, help="after which no further test begins")


def pytest_sessionstart(session):
    session.end = time.monotonic() + session.config.getoption("--seconds")


def pytest_runtest_teardown(item):
    # a signal would end the run that a test makes, and not pytest
    if time.monotonic() > item.session.end:
        item.session.shouldstop = "the time was up"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Prepared sets of tests lie in a folder of their own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch, request):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, str]:
    """Paths of a pool of 90 rows, 30 validation rows, 16 test rows and the truth."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"pool": 90, "validation": 30, "test": 16, "truth": 90}
    return {
        name: write_jsonl(folder / f"{name}.jsonl", read_jsonl(TOY / f"{name}.jsonl")[:size])
        for name, size in sizes.items()
    }


@pytest.fixture
def flags(small, tmp_path) -> list[str]:
    """Command-line flags of a short run on the small data."""
    return [
        "--config=configs/quickstart.yaml",
        *(f"--data.{name}={path}" for name, path in small.items()),
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=4",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
