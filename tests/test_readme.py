"""The README's own code runs, its commands run as they are written, and the files it names exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.files import ROOT, TOY, read_jsonl, write_jsonl

README = (ROOT / "README.md").read_text()
PARTS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, flags=re.S | re.M))
BLOCKS = [
    (part, number, block)
    for part, text in PARTS.items()
    if part not in ("Results", "Performance")  # these have placeholders (see tests/test_compare.py), or need a GPU
    for number, block in enumerate(re.findall(r"^```\n(.*?)^```$", text, flags=re.S | re.M))
    if block.startswith(("lit-bilevel", "python ", "head "))
]
LIMITS = {  # of every run, by the environment, so that the commands stay as they are
    "TRAINER__MAX_STEPS": "12",
    "TRAINER__ACCELERATOR": "cpu",
    "DATA__EVAL_BATCH_SIZE": "128",
}


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    weights = namespace["weights"]
    assert len(weights) == 4000
    assert abs(float(weights.mean()) - 1) < 1e-9
    assert float(weights.std()) > 0


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:\./)?((?:scripts|configs|lit_bilevel|tests)/[\w/.]+\.(?:sh|py|yaml))", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(\w+\.yaml)`", README):
        assert list((ROOT / "configs").rglob(name)) or name == "config.yaml", name


def test_the_first_commands_are_scripts():
    (block,) = re.findall(r"^```\n(\./.*?)^```$", README, flags=re.S | re.M)
    for line in block.splitlines():
        script = ROOT / line.split()[0]
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_formats_are_those_that_are_known():
    from lit_bilevel.data.formats import FORMATS

    named = re.findall(r"^\| `(\w+)` \| `", PARTS["Data"], flags=re.M)
    assert sorted(named) == sorted(known.name for known in FORMATS)


def commands(block: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def new_users_folder(folder: Path) -> dict[str, str]:
    """A folder with a user's files in it, and an environment where the commands are installed."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    scripts = {
        "lit-bilevel": f'exec {sys.executable} -m lit_bilevel "$@"',
        "python": f'exec {sys.executable} "$@"',
        "tensorboard": 'test "$1" = --logdir && ls "$2"/events.*',  # the real one does not end
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    pool = [{"instruction": r["prompt"], "output": r["response"]} for r in read_jsonl(TOY / "pool.jsonl")[:200]]
    write_jsonl(folder / "pool.jsonl", pool)
    trusted = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in read_jsonl(TOY / "validation.jsonl")[:60]
    ]
    write_jsonl(folder / "trusted.jsonl", trusted)
    shutil.copy(TOY / "test.jsonl", folder / "held_out.jsonl")
    shutil.copytree(TOY / "model", folder / "my_model")
    limits = {f"LIT_BILEVEL_{command}__{k}": v for command in ("FIT", "TEST", "PREDICT") for k, v in LIMITS.items()}
    path = f"{programs}:{os.environ['PATH']}"
    return {**os.environ, **limits, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(commands: list[str], folder: Path) -> None:
    environment = new_users_folder(folder)
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "number", "block"), BLOCKS, ids=[f"{part}-{number}" for part, number, _ in BLOCKS])
def test_commands_run_as_written_in_a_fresh_folder(tmp_path, part, number, block):
    run(commands(block), tmp_path)
    if part.startswith("A tour"):
        assert len(read_jsonl(tmp_path / "selected.jsonl")) == 120
        assert read_jsonl(tmp_path / "selected.jsonl")[0].keys() == {"instruction", "output"}
        assert json.loads((tmp_path / "runs/mine/metrics.json").read_text())["test/loss"] > 0
        assert len(read_jsonl(tmp_path / "runs/mine/predictions.jsonl")) == len(read_jsonl(TOY / "test.jsonl"))
        assert (tmp_path / "runs/refine/weights.parquet").exists()
    if "csv.yaml" in block:
        header = (tmp_path / "runs/quickstart/metrics.csv").read_text().splitlines()[0].split(",")
        assert {"lower/loss", "weights/effective_size"} <= set(header)


def test_the_blocks_that_are_run_are_all_there_are():
    """A new block is run, too, or it is named here with the reason."""
    ran = {part for part, _, _ in BLOCKS}
    assert ran >= {"A tour on your own data", "Several GPUs, larger models", "Looking at a run"}
    every = [
        (part, block)
        for part, text in PARTS.items()
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.S | re.M)
    ]
    left_out = [(part, block) for part, block in every if (part, block) not in [(p, b) for p, _, b in BLOCKS]]
    kinds = {"Several GPUs, larger models": "torchrun", "Performance": "python scripts/benchmark.py"}
    kinds |= {"How it works": " pool ──►", "Where it comes from": "@software", "Taking it away": "from lightning"}
    for part, block in left_out:
        assert part == "Results" or block.startswith(kinds.get(part, "?")), block
