"""Nothing is lost: stopped and refused runs, and checkpoints that a failure cannot spoil (`test_kills.py` kills)."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.files import read_jsonl, write_jsonl
from support.mortal import same
from support.resuming import Signal, fit, short

from lit_bilevel.callbacks import BilevelCheckpoint, WarmStart
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.training.checkpoint_io import AtomicCheckpointIO

# ---- signals ----


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(["fit", *short(small, folder)]) == 0
    return folder


@pytest.mark.filterwarnings("ignore:the run in .* is finished")  # the last of these stops there
@pytest.mark.parametrize(
    ("hook", "step", "number", "saved"),
    [
        ("on_train_batch_start", 4, signal.SIGTERM, 5),
        ("on_validation_batch_start", 8, signal.SIGTERM, 8),
        ("on_train_batch_end", 4, signal.SIGINT, 4),
        ("on_train_epoch_end", 12, signal.SIGTERM, 12),
    ],
)
def test_a_signal_ends_in_an_exact_checkpoint(small, tmp_path, uninterrupted, hook, step, number, saved):
    flags = short(small, tmp_path / "run")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        fit(flags, callbacks=(Signal(hook, step, number),))
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == saved
    assert main(["fit", *flags, "--ckpt_path=last"]) == 0
    same(uninterrupted, tmp_path / "run")


# ---- checkpoints ----


class LastSaved(Callback):
    """Step of `last.ckpt` when the first step after a validation begins."""

    def __init__(self, folder: Path):
        self.path, self.steps = folder / "checkpoints" / "last.ckpt", []

    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step in (4, 8):
            self.steps.append(torch.load(self.path, weights_only=True)["global_step"])


def test_every_validation_saves_the_last_state(small, tmp_path):
    """Also where the monitor loss never falls: the policy does not learn here."""
    watch = LastSaved(tmp_path)
    fit(short(small, tmp_path), "--model.optimizer.init_args.lr=0", callbacks=(watch,))
    assert watch.steps == [4, 8]
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4


def test_a_failure_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path, save = tmp_path / "checkpoints" / "last.ckpt", torch.save
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint, file):
        save(checkpoint, file)
        file.truncate(file.tell() // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_checkpoints_by_the_clock_and_by_validation(small, tmp_path):
    class Steps(Callback):
        saved: list[int] = []  # noqa: RUF012

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            self.saved.append(trainer.global_step)

    fit(short(small, tmp_path), "--checkpoint.every_minutes=0", "--trainer.max_steps=6", callbacks=(Steps(),))
    assert set(Steps.saved) == {1, 2, 3, 4, 5, 6}
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 4


def test_a_new_run_keeps_the_checkpoints_of_an_earlier_one(small, tmp_path):
    for _ in range(2):
        fit(short(small, tmp_path), "--trainer.max_steps=4", "--data.test=null", "--data.truth=null")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "earlier-last.ckpt",
        "earlier-best.ckpt",
    }


def refused(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_changed_data_are_refused_by_name(small, tmp_path, uninterrupted, capsys):
    flags = [*short(small, uninterrupted), "--ckpt_path=last"]
    records = read_jsonl(Path(small["pool"]))
    records[3]["response"] += "!"
    edited = write_jsonl(tmp_path / "edited.jsonl", records)
    fewer = write_jsonl(tmp_path / "fewer.jsonl", records[:-2])
    text = refused(["fit", *flags, f"--data.pool={edited}"], capsys)
    assert "`data.pool`" in text
    assert "other ids, texts or tokens" in text
    assert "`data.validation`" not in text
    assert "88 rows instead of 90" in refused(["fit", *flags, f"--data.pool={fewer}"], capsys)
    text = refused(["fit", *flags, "--data.batch_size=4"], capsys)
    assert "pool rows of a policy step is 4 and was 8" in text


def test_a_checkpoint_of_another_schema_is_refused(small, tmp_path, uninterrupted, capsys):
    checkpoint = torch.load(uninterrupted / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["lit_bilevel"]["schema"] = 999
    torch.save(checkpoint, tmp_path / "future.ckpt")
    text = refused(["fit", *short(small, tmp_path), f"--ckpt_path={tmp_path / 'future.ckpt'}"], capsys)
    assert "schema 999" in text
    del checkpoint["lit_bilevel"]["schema"]
    torch.save(checkpoint, tmp_path / "past.ckpt")
    assert "schema 1" in refused(["fit", *short(small, tmp_path), f"--ckpt_path={tmp_path / 'past.ckpt'}"], capsys)
    text = refused(["fit", *short(small, tmp_path), f"--ckpt_path={tmp_path / 'best.ckpt'}"], capsys)
    assert "best.ckpt does not exist; check `--ckpt_path` (in that folder: future.ckpt, past.ckpt)" in text


def test_a_checkpoint_of_another_model_is_refused(small, uninterrupted, capsys):
    flags = [*short(small, uninterrupted), "--ckpt_path=last"]
    text = refused(["fit", *flags, "--model.policy.lora={r: 2, dropout: 0.2}"], capsys)
    assert "the checkpoint does not fit the model" in text


def test_a_resumed_run_is_not_started_from_other_weights(tmp_path):
    start = WarmStart(str(tmp_path / "gone.parquet"))
    start.on_load_checkpoint(None, None, {})
    start.on_fit_start(None, None)


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"every_minutes": -1.0}], ids=str)
def test_wrong_checkpoint_settings_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        BilevelCheckpoint(**setting)


def test_checkpoint_settings_are_usable_from_python():
    assert BilevelCheckpoint(every_minutes=10).every_minutes == 10


def test_the_best_state_is_known_in_a_folder_that_was_moved(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "moved")
    saved = torch.load(tmp_path / "moved" / "checkpoints" / "last.ckpt", weights_only=True)
    state = next(state for name, state in saved["callbacks"].items() if name.startswith("BilevelCheckpoint"))
    checkpoint = BilevelCheckpoint(dirpath=str(tmp_path / "moved" / "checkpoints"))
    checkpoint.load_state_dict(state)
    assert checkpoint.best_model_score == state["best_model_score"]
    assert list(checkpoint.best_k_models) == [checkpoint.best_model_path]
    assert checkpoint.best_model_path == str(tmp_path / "moved" / "checkpoints" / "best.ckpt")
