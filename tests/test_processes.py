"""One process and several leave the same files and log the same figures, whatever the numbers of rows.

Fit with refinement, validate, test and predict, by their command lines. The sets have 23, 13 and 5 rows, so no number
of processes divides them, or 1 row where that is the point; batches of evaluation have 2 rows, so that a process has
more than one of them.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import ranks
from support.files import TOY, read_jsonl, write_jsonl

from lit_bilevel.inspection.curves import read_curves

ROWS = {"pool": 23, "validation": 13, "test": 5}
FEW = {"pool": 4, "validation": 3, "test": 1}
STAGES = ("validate", "test")
OWN = {  # settings in which the runs differ
    "trainer": ("devices", "strategy", "default_root_dir", "precision", "plugins", "logger"),
    "data": ("batch_size",),
}
NAMED_AFTER_PROCESSES = ("inspection/settings.json", "policy/README.md")  # both tell `batch_size`, per process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    ranks.save_model(folder / "model")
    for name, size in ROWS.items():
        records = read_jsonl(TOY / f"{name}.jsonl")[:size]
        write_jsonl(folder / f"{name}.jsonl", [*records, *([{"prompt": "no answer"}] if name == "pool" else [])])
        write_jsonl(folder / f"few_{name}.jsonl", records[: FEW[name]])
    return folder


def commands(run: Path, processes: int, few: bool = False, sharded: bool = False) -> list[list[str]]:
    """Command lines of the four stages, as each of so many processes is given them."""
    data = run.parent.parent
    files = {name: data / f"{'few_' if few else ''}{name}.jsonl" for name in ROWS}
    common = [
        f"--config=configs/{'quickstart' if sharded else 'refine'}.yaml",
        *(f"--data.{name}={path}" for name, path in files.items()),
        "--data.truth=null",
        "--data.on_bad_row=skip",
        f"--data.batch_size={(3 if few else 6) // processes}",
        "--data.eval_batch_size=2",
        "--data.monitor_fraction=0.3",
        f"--model.policy.path={data / 'model'}",
        "--model.max_new_tokens=8",
        f"--trainer.devices={processes}",
        "--trainer.max_epochs=3",
        "--trainer.val_check_interval=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={run}",
    ]
    if not sharded:
        common += ["--trainer.precision=64-true", "--trainer.callbacks.every_n_steps=4", "--trainer.callbacks.start=4"]
        common += ["--trainer.callbacks.keep_unfinished=true", "--trainer.callbacks.offline_share=0.25"]
    if processes > 1 and sharded:
        common += ["--config=configs/strategies/fsdp2.yaml"]
    elif processes > 1:
        common += ["--trainer.strategy=ddp"]
    best = f"--ckpt_path={run}/checkpoints/best.ckpt"
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.name="]
    return [
        ["fit", *common],
        *([stage, *common, best, *logger, f"--trainer.logger.save_dir={run / stage}"] for stage in STAGES),
        *([] if sharded else [["predict", *common, best]]),  # refused there
    ]


def run_all(folder: Path, processes: int, **settings: Any) -> Path:
    run = folder / f"{'_'.join(settings)}{processes}" / "run"
    statuses = ranks.runs(commands(run, processes, **settings), run.parent / "log", processes, timeout=400)
    assert statuses == [0] * len(statuses), (run.parent / "log" / "log0.txt").read_text()[-3000:]
    return run


def contents(run: Path) -> dict[str, Any]:
    """What every file of a run says, and every logged figure; the checkpoints are compared by what they lead to."""
    found: dict[str, Any] = {"curves": {tag: list(map(list, curve)) for tag, curve in read_curves(run).items()}}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.name.startswith("events."):
            continue
        told = path.suffix not in (".ckpt", ".png") and name not in NAMED_AFTER_PROCESSES
        found[name] = READERS.get(path.suffix, Path.read_text)(path) if told else "is there"
    for group, names in OWN.items():
        found["config.yaml"][group] = {k: v for k, v in found["config.yaml"][group].items() if k not in names}
    return found


READERS: dict[str, Any] = {
    ".jsonl": read_jsonl,
    ".json": lambda path: json.loads(path.read_text()),
    ".parquet": lambda path: pyarrow.parquet.read_table(path).to_pydict(),
    ".safetensors": lambda path: {name: value.flatten().tolist() for name, value in load_file(path).items()},
    ".csv": lambda path: list(csv.DictReader(path.read_text().splitlines())),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
}


TIMES = {name for time in ("seconds", "tokens_per_second", "share_of_time") for name in (time, f"refine/{time}")}
"""What two runs never have in common."""


def assert_same(one: Any, other: Any, tolerance: float, where: str = "") -> None:
    """Equal, and where there are numbers, as near as the tolerance."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - TIMES:
            assert_same(one[key], other[key], tolerance, f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, tolerance, f"{where}/{number}")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance, nan_ok=True), where
    elif isinstance(one, str) and isinstance(other, str) and one != other:
        try:
            assert float(one) == pytest.approx(float(other), abs=tolerance), where
        except ValueError:
            raise AssertionError(f"{where}: {one!r} is not {other!r}") from None
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    return contents(run_all(folder, 1))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_stage_leaves_what_one_process_leaves(folder, alone, processes):
    several = contents(run_all(folder, processes))
    files = ("weights.parquet", "metrics.json", "responses.jsonl", "predictions.jsonl", "skipped.jsonl", "config.yaml")
    assert alone.keys() >= {*files, "policy/model.safetensors", *(f"{name}/version_0/metrics.csv" for name in STAGES)}
    assert len(alone["predictions.jsonl"]) == ROWS["test"]
    assert len(alone["curves"]["monitor/loss"]) == 4
    assert torch.tensor(alone["weights.parquet"]["weight"]).std() > 0.05
    assert_same(alone, several, 1e-6)  # float32 is what loggers and files have


@pytest.mark.slow
def test_fewer_rows_than_processes(folder):
    """One monitor row, one test row, and policy steps of two pool rows for three processes."""
    one, three = (contents(run_all(folder, processes, few=True)) for processes in (1, 3))
    assert len(one["predictions.jsonl"]) == 1
    assert len(one["responses.jsonl"]) > 0
    assert_same(one, three, 1e-6)


@pytest.mark.slow
def test_a_pool_of_fewer_rows_than_processes_is_refused(folder):
    write_jsonl(folder / "two.jsonl", read_jsonl(TOY / "pool.jsonl")[:2])
    (fit, *_) = commands(folder / "refused" / "run", 3, few=True)
    assert ranks.runs([[*fit, f"--data.pool={folder / 'two.jsonl'}"]], folder / "refused" / "log", 3) == [2]
    said = (folder / "refused" / "log" / "log0.txt").read_text()
    assert "the pool has 2 rows and a policy step takes 3; lower" in said
    assert "the number of processes (3)" in said


@pytest.mark.slow
def test_a_sharded_policy_is_evaluated_on_every_row(folder):
    one, two = (contents(run_all(folder, processes, sharded=True)) for processes in (1, 2))
    for name in ("curves", "metrics.json", *(f"{stage}/version_0/metrics.csv" for stage in STAGES)):
        assert_same(one[name], two[name], 2e-3, name)
