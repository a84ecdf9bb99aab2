"""What a new user runs into first: settings left as they came, looks that never happen, folders of loggers."""

from __future__ import annotations

import torch

from lit_bilevel.cli import main


def test_settings_that_still_have_to_be_given_are_named_at_once(capsys):
    assert main(["fit", "--config=configs/quality.yaml", "--data.pool=pool.jsonl"]) == 2
    message = "lit-bilevel: `model.policy.path`, `data.validation` still say set_me; give your own.\n"
    assert capsys.readouterr().err == message


def test_a_logger_without_a_folder_writes_into_that_of_the_run(flags, tmp_path):
    assert main(["fit", *flags, "--config=configs/loggers/csv.yaml", "--trainer.max_steps=4"]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"metrics.csv", "checkpoints", "config.yaml", "weights.parquet"} <= names


def test_what_will_never_happen_is_said(flags, tmp_path, recwarn):
    """The run is shorter than the time between two looks at the monitor loss, and nothing is refined."""
    flags = [flag for flag in flags if "configs/" not in flag and "val_check" not in flag]
    never = ["--config=configs/refine.yaml", "--trainer.val_check_interval=13"]
    assert main(["fit", *never, *flags]) == 0
    texts = [str(warning.message) for warning in recwarn]
    assert any("is 13 and the run has 12 steps, so the monitor loss is looked at once, after" in t for t in texts)
    assert any("nothing will be refined: the first round comes after 375 steps" in text for text in texts)
    best, last = (torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] == 12
