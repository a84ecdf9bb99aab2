"""The recipe of `curate.yaml`: a scored prior, a sweep, the policy, in one run that survives kills."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lightning.pytorch import Trainer
from support.files import TOY
from support.mortal import Moment, Run, same

from lit_bilevel import (
    BilevelDataModule,
    CleanProbability,
    CrossFit,
    LitBilevel,
    Phase,
    PolicySettings,
    ScoredPrior,
    SigmoidWeights,
)
from lit_bilevel.cli import main


def curate_flags(small: dict[str, str], folder: Path, *more: str) -> list[str]:
    """Two epochs of 12 steps, the border after the eighth, validation after every fourth."""
    return [
        "--config=configs/curate.yaml",
        *(f"--data.{name}={path}" for name, path in small.items()),
        f"--model.policy.path={TOY / 'model'}",
        "--model.policy.lora=null",
        "--data.batch_size=8",
        "--data.max_length=64",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.val_check_interval=4",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_n_steps=1",
        "--figures.enabled=false",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    killed = Run(curate_flags(small, folder / "run"), folder / "log")
    assert killed.wait() == [0], killed.text()
    return folder / "run"


BORDERS = [
    Moment("part of the scores", 2),
    Moment("scores"),
    Moment("prior"),
    Moment("forward", 2),  # before the pool models are on their way
    Moment("step", 5),
    Moment("closing"),
    Moment("prior"),  # the second, for the first is in the checkpoint
    Moment("checkpoint", 1),
    Moment("closing"),
    Moment("forward", 2),
    Moment("half a checkpoint", 2),
    Moment("policy"),
]
FEW = [moment for moment in BORDERS if moment.name in ("part of the scores", "step", "closing")]


@pytest.mark.parametrize("moments", [FEW, pytest.param(BORDERS, marks=pytest.mark.slow)], ids=len)
def test_kills_at_every_border_change_no_bit(small, whole, tmp_path, moments):
    flags = curate_flags(small, tmp_path / "killed")
    log = tmp_path / "log"
    for moment in moments:
        killed = Run(flags, log, moment=moment)
        ends = killed.wait()
        assert ends == [-moment.number], f"{moment} {ends}: {killed.text()}"
    last = Run(flags, log)
    assert last.wait() == [0], last.text()
    same(whole, tmp_path / "killed")
    assert log.read_text().count("parts are known from") >= 1


REFINED = (
    "--trainer.max_epochs=4",
    "--trainer.callbacks+=SelfRefine",
    "--trainer.callbacks.every_n_steps=6",
    "--trainer.callbacks.start=32",
    "--trainer.callbacks.sampling.max_new_tokens=8",
)


@pytest.mark.slow
def test_ten_kills_at_random_times_change_no_bit(small, tmp_path):
    """With refinement on; at a tenth of the time that a run takes by itself, on average, after the last kill."""
    flags = curate_flags(small, tmp_path / "whole", *REFINED)
    began = time.monotonic()
    undisturbed = Run(flags, tmp_path / "log of the whole")
    assert undisturbed.wait() == [0], undisturbed.text()
    seconds = time.monotonic() - began
    flags, log, draw = curate_flags(small, tmp_path / "killed", *REFINED), tmp_path / "log", random.Random(0)
    kills = 0
    while kills < 10:
        attempt = Run(flags, log)
        end = time.monotonic() + draw.uniform(0.1, 0.4) * seconds
        while attempt.alive() and time.monotonic() < end:
            time.sleep(0.01)
        if not attempt.alive():
            break
        attempt.kill()
        attempt.wait()
        kills += 1
    last = Run(flags, log)
    assert last.wait() == [0], last.text()
    assert kills >= 5, f"only {kills} kills came in time"
    same(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed" / "responses.jsonl").read_text().count("\n") > 0


@pytest.mark.slow
def test_two_processes_curate_as_one_does(small, tmp_path):
    """The whole recipe with refinement; batches are halved, so that a step sees the same rows."""
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4"]
    for folder, processes, more in (("one", 1, []), ("two", 2, two)):
        done = Run(curate_flags(small, tmp_path / folder, *REFINED, *more), tmp_path / f"{folder}.log", processes)
        assert done.wait() == [0] * processes, done.text()
    one, other = (pq.read_table(tmp_path / folder / "weights.parquet") for folder in ("one", "two"))
    assert one["id"] == other["id"]
    assert one["visits"] == other["visits"]
    assert np.allclose(one["weight"], other["weight"], rtol=1e-3)
    losses = [json.loads((tmp_path / folder / "metrics.json").read_text())["test/loss"] for folder in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_recipe_says_what_it_does(whole):
    told = (whole.parent / "log").read_text()
    for text in (
        "scored 90 pool rows in",
        "the weights begin at ifd + density_ratio + hidden_ratio, effective size",
        "phase 1 of 2, pool:",
        "of 90 pool rows (",
        " are like the 24 trusted ones (prior ",
        "phase 2 of 2, policy:",
    ):
        assert told.count(text) == 1, text


def test_the_recipe_in_python(small, tmp_path):
    """The ten lines of the documentation."""
    phases = [
        Phase("pool", 1 / 3, learning_rate=0, learn_weights=False, prepare_solver=True),
        Phase("policy", 2 / 3, upper_weight=0.25, learning_rate=1.0, learn_weights=False),
    ]
    module = LitBilevel(
        PolicySettings(str(TOY / "model")), SigmoidWeights(), CrossFit(learning_rate=1e-3), phases=phases
    )
    data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=64)
    trainer = Trainer(
        max_steps=6,
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[ScoredPrior(), CleanProbability()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    assert module.weights.table().std() > 0.1


def test_refinement_after_the_weights(small, tmp_path):
    """The fourth part, where it is asked for."""
    refine = ["--trainer.callbacks+=SelfRefine", "--trainer.callbacks.every_n_steps=4", "--trainer.callbacks.start=16"]
    flags = curate_flags(small, tmp_path, *refine, "--trainer.callbacks.sampling.max_new_tokens=8")
    assert main(["fit", *flags]) == 0
    assert (tmp_path / "responses.jsonl").read_text().count("\n") > 0
