"""Every callback of Lightning works or is refused by name; the run's own results come from its own checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from safetensors.torch import load_file

from lit_bilevel.callbacks import BilevelCheckpoint
from lit_bilevel.cli import BilevelCLI
from lit_bilevel.errors import UserError

MANUAL = "ignore:Using ModelCheckpoint with manual optimization.*"


class Finetuning(lightning_callbacks.BaseFinetuning):
    """One of a user's own."""

    def freeze_before_training(self, pl_module): ...

    def finetune_function(self, pl_module, epoch, optimizer): ...


class Writer(BasePredictionWriter):
    """One of a user's own."""


REFUSED = {
    "BaseFinetuning": Finetuning,
    "BackboneFinetuning": BackboneFinetuning,
    "BatchSizeFinder": BatchSizeFinder,
    "EMAWeightAveraging": EMAWeightAveraging,
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 2}),
    "LearningRateFinder": LearningRateFinder,
    "ModelPruning": lambda: ModelPruning("l1_unstructured"),
    "OnExceptionCheckpoint": lambda: OnExceptionCheckpoint("."),
    "SpikeDetection": SpikeDetection,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.1),
    "WeightAveraging": WeightAveraging,
}
WORKING = {  # and in how many policy steps of twelve
    "BasePredictionWriter": (lambda: Writer("batch"), 12),
    "DeviceStatsMonitor": (DeviceStatsMonitor, 12),
    "EarlyStopping": (lambda: EarlyStopping("monitor/loss", patience=0, min_delta=100.0), 8),
    "LambdaCallback": (LambdaCallback, 12),
    "LearningRateMonitor": (lambda: LearningRateMonitor("step"), 12),
    "ModelCheckpoint": (lambda: ModelCheckpoint(every_n_train_steps=5, save_top_k=-1), 12),
    "ModelSummary": (ModelSummary, 12),
    "RichModelSummary": (RichModelSummary, 12),
    "RichProgressBar": (RichProgressBar, 12),
    "ThroughputMonitor": (lambda: ThroughputMonitor(lambda batch: 8, window_size=4), 12),
    "Timer": (lambda: Timer("00:12:00:00"), 12),
    "TQDMProgressBar": (TQDMProgressBar, 12),
}
BASES = {"Callback", "Checkpoint", "ProgressBar"}


def fit(flags, *callbacks) -> BilevelCLI:
    bars = any(isinstance(callback, lightning_callbacks.ProgressBar) for callback in callbacks)
    flags = [f for f in flags if not (bars and "enable_progress_bar" in f) and "enable_model_summary" not in f]
    short = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=6", "--figures.enabled=false"]
    return BilevelCLI(["fit", *flags, *short], trainer_defaults={"callbacks": list(callbacks)})


def test_all_of_lightning_is_known():
    assert {*REFUSED, *WORKING, *BASES} == set(lightning_callbacks.__all__)


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_that_cannot_work_is_refused_by_name(flags, tmp_path, name):
    callback = REFUSED[name]()
    with pytest.raises(UserError, match=rf"the callback `{type(callback).__name__}` cannot be used: .*"):
        fit(flags, callback)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.filterwarnings(MANUAL, "ignore:When using the `ThroughputMonitor`.*flops_per_batch.*")
def test_a_callback_that_can_work_does(flags, tmp_path, name):
    make, steps = WORKING[name]
    cli = fit(flags, make())
    assert cli.trainer.global_step == steps
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/loss"] > 0
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


# ---- a second `ModelCheckpoint` ----

OTHERS = {
    "every few steps": {"every_n_train_steps": 5, "save_top_k": -1},
    "the highest of another metric": {"monitor": "lower/loss", "mode": "max", "every_n_train_steps": 1},
    "the worst": {"monitor": "monitor/loss", "mode": "max", "filename": "worst"},
    "weights alone": {"save_weights_only": True, "every_n_train_steps": 5, "filename": "weights"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings(MANUAL)
def test_results_come_from_the_run_s_own_checkpoint(flags, tmp_path, name):
    other = json.dumps([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": OTHERS[name]}])
    # a high rate, so that the monitor loss is best in the middle
    rate = ["--model.optimizer.init_args.lr=0.05", "--trainer.val_check_interval=2"]
    cli = fit([*flags, *rate, f"--trainer.callbacks={other}"])
    assert not isinstance(cli.trainer.checkpoint_callback, BilevelCheckpoint)  # the first of several
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert best["global_step"] < last["global_step"]
    exported = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    for key, value in exported.items():
        assert torch.equal(value, best["state_dict"][f"policy.model.{key}"])
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    own = next(c for c in cli.trainer.callbacks if isinstance(c, BilevelCheckpoint))
    assert f"chose the checkpoint) | {float(own.best_model_score):.4f} |" in card
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())["test/loss"]
    tested = cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=own.best_model_path, verbose=False)
    assert tested[0]["test/loss"] == pytest.approx(said, rel=1e-5)


def test_a_checkpoint_callback_that_would_write_over_the_run_s_own_is_refused(flags, tmp_path):
    folder = str(tmp_path / "run" / "checkpoints")
    for other, message in (
        (ModelCheckpoint(save_last=True), "has `save_last`"),
        (ModelCheckpoint(filename="best"), r"saves to .*/best.ckpt, which is the run's own"),
        (ModelCheckpoint(dirpath=folder, filename="last"), r"saves to .*/last.ckpt, which is the run's own"),
    ):
        with pytest.raises(UserError, match=message):
            fit(flags, other)


# ---- a run folder that cannot be written ----


def refused(flags, place, capsys) -> str:
    from lit_bilevel.cli import main

    assert main(["fit", *flags, f"--trainer.default_root_dir={place}"]) == 2
    said = capsys.readouterr().err
    assert "format prompt_response" not in said  # before any data are read
    assert "Traceback" not in said
    return said


def test_a_run_folder_that_cannot_be_made_is_named_at_the_start(flags, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    assert f"`trainer.default_root_dir` is {file}, where nothing can be written (Not a directory)" in refused(
        flags, file, capsys
    )
    assert "(Not a directory)" in refused(flags, file / "run", capsys)
    assert "`trainer.default_root_dir` is /proc/run" in refused(flags, "/proc/run", capsys)
    long = tmp_path / ("x" * 300)
    assert "(File name too long)" in refused(flags, long, capsys)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() != 0:  # who may write anywhere
        assert "(Permission denied)" in refused(flags, closed / "run", capsys)

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lit_bilevel.training.folder.os.fsync", full)
        assert "(No space left on device)" in refused(flags, tmp_path / "new" / "run", capsys)
    assert not list(tmp_path.rglob(".tried-*"))
    assert not (tmp_path / "new").exists()  # or processes of a run would take it away from each other


def test_checkpoints_that_cannot_be_written_are_named_at_the_start(flags, tmp_path, capsys, monkeypatch):
    from collections import namedtuple

    from lit_bilevel.cli import main

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    assert main(["fit", *flags]) == 2
    assert "`checkpoint.dirpath` is" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").unlink()
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr("lit_bilevel.training.folder.shutil.disk_usage", lambda place: usage)
    assert main(["fit", *flags]) == 2
    assert "0.00 GB are free, and the checkpoints and the policy of this run need about" in capsys.readouterr().err


def test_a_disk_that_is_full_later_ends_in_one_message(flags, tmp_path, capsys, monkeypatch):
    from lit_bilevel.cli import main

    def full(*arguments, **settings) -> None:
        raise OSError(28, "No space left on device", str(Path("runs") / "last.ckpt"))

    monkeypatch.setattr("lit_bilevel.training.checkpoint_io.torch.save", full)
    assert main(["fit", *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "a file could not be written (runs/last.ckpt): No space left on device; make room" in said
