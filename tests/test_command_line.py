"""The command line: refusals in one message without a traceback, and quick answers."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.files import ROOT, read_jsonl, write_jsonl

from lit_bilevel.cli import main

# ---- refusals: one message, no traceback, nothing left that looks finished ----


def refusal(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_wrong_paths_are_refused(flags, capsys, tmp_path):
    assert "nowhere.jsonl does not exist" in refusal(["fit", *flags, "--data.pool=nowhere.jsonl"], capsys)
    assert "no tokenizer could be loaded from 'nowhere'" in refusal(
        ["fit", *flags, "--model.policy.path=nowhere"], capsys
    )
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / "weights.parquet").exists()


def test_bad_data_is_refused(flags, small, capsys, tmp_path):
    records = read_jsonl(Path(small["pool"]))
    records[4]["response"] = ""
    bad = write_jsonl(tmp_path / "bad.jsonl", records)
    message = refusal(["fit", *flags, f"--data.pool={bad}"], capsys)
    assert re.search(r"bad\.jsonl.*line 5.*`response` is empty", message)


def test_settings_without_meaning_are_refused(flags, capsys):
    assert "`model.upper_weight` is 0.0, so λ is 0 in some step, where `Penalty` has no meaning" in refusal(
        ["fit", *flags, "--model.solver=Penalty", "--model.upper_weight=0"], capsys
    )
    falling = ["fit", *flags, "--model.solver=Penalty", "--model.upper_weight_decay=0.25"]
    assert "so λ is 0 in epoch 3, where `Penalty`" in refusal([*falling, "--trainer.max_epochs=3"], capsys)
    open_end = [*falling, "--trainer.max_epochs=-1", "--trainer.max_steps=2"]
    assert "so λ is 0 after some epochs, where `Penalty`" in refusal(open_end, capsys)
    assert main([*falling, "--trainer.max_epochs=2", "--trainer.max_steps=2"]) == 0  # λ stays above 0
    assert "the pool has 90 rows and a policy step takes 128" in refusal(
        ["fit", *flags, "--data.batch_size=128"], capsys
    )
    assert "has one row" in refusal(["fit", *flags, "--data.batch_size=1", "--trainer.max_steps=1"], capsys)


def test_stale_results_do_not_survive_a_failed_run(flags, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")
    refusal(["fit", *flags, "--data.batch_size=1", "--trainer.max_steps=1"], capsys)
    assert not (run / "metrics.json").exists()


# ---- quick answers ----


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_the_top_level_answers_in_about_a_second(argument):
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "lit_bilevel", argument], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert time.perf_counter() - started < 2
    assert "lit-bilevel" in result.stdout
