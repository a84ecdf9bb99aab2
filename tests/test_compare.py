"""Whole comparisons on small data: tables that survive a kill, runs that fail, mistakes told before any run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from support.comparing import Killed, compare, table_of
from support.files import TOY, read_jsonl

from lit_bilevel.comparison.results import Results
from lit_bilevel.comparison.run import Runner
from lit_bilevel.comparison.stopwatch import Stopwatch
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel


def test_a_table_survives_a_kill_and_is_not_run_twice(small, tmp_path, monkeypatch, capsys):
    asked = ["--methods", "mixing", "two_stage:one_step", "oracle", "--checkpoint.every_n_steps=1", "--subset", "60"]
    with monkeypatch.context() as patched:
        step = LitBilevel.training_step

        def killed(self, batch, batch_idx):
            if "two_stage" in self.trainer.default_root_dir and self.global_step == 1:
                raise Killed
            return step(self, batch, batch_idx)

        patched.setattr(LitBilevel, "training_step", killed)
        with pytest.raises(Killed):
            compare(small, tmp_path / "a", *asked)
    assert list(table_of(tmp_path / "a")) == ["mixing", "one_step"]
    assert (tmp_path / "a" / "two_stage-one_step" / "seed0" / "checkpoints" / "last.ckpt").exists()
    assert compare(small, tmp_path / "a", *asked) == 0
    assert compare(small, tmp_path / "b", *asked) == 0
    tables = [table_of(tmp_path / name) for name in "ab"]
    assert list(tables[0]) == ["mixing", "one_step", "two_stage:one_step", "oracle"]
    for name in tables[0]:
        assert tables[0][name]["test_loss"] == tables[1][name]["test_loss"]
    losses = pyarrow.parquet.read_table(tmp_path / "a" / "test_losses.parquet")
    assert np.mean(losses["mixing"].to_numpy()) == pytest.approx(float(tables[0]["mixing"]["test_loss"]), rel=1e-5)
    kept = read_jsonl(tmp_path / "a" / "oracle" / "seed0" / "pool" / "pool.jsonl")
    clean = {row["id"] for row in read_jsonl(TOY / "truth.jsonl") if not row["corrupted"]}
    assert {row["id"] for row in kept} <= clean
    assert "gap closed" in (tmp_path / "a" / "results.md").read_text()
    monkeypatch.setattr(Runner, "_run", None)  # nothing is left to run
    assert compare(small, tmp_path / "a", *asked) == 0
    capsys.readouterr()
    assert compare(small, tmp_path / "a", *asked[:-1], "50") == 2
    assert "other settings (subset)" in capsys.readouterr().err


def test_a_recipe_runs_beside_other_methods_under_a_configuration_without_its_phases(small, tmp_path):
    assert compare(small, tmp_path, "--methods", "curate", "mixing") == 0
    table = table_of(tmp_path)
    assert float(table["curate"]["steps"]) > float(table["mixing"]["steps"]) == 2  # before the last phase
    assert 0 <= float(table["curate"]["auroc/all"]) <= 1
    assert "auroc/all" not in {k for k, v in table["mixing"].items() if v}
    text = (tmp_path / "results.md").read_text()
    assert "The monitor part (" in text or "cannot tell" in text


def test_a_run_that_fails_stops_no_others(small, tmp_path, capsys):
    variants = tmp_path / "variants.yaml"
    wrong = "{method: one_step, flags: {model.upper_weight: 2}}"
    missing = "{method: one_step, flags: {model.no_such_setting: 2}}"
    variants.write_text(f"wrong: {wrong}\nmissing: {missing}\n")
    output = tmp_path / "out"
    asked = ["--methods", "wrong", "missing", "two_stage:wrong", "mixing", "--variants", str(variants)]
    assert compare(small, output, *asked) == 2
    assert list(table_of(output)) == ["mixing"]
    shown = capsys.readouterr()
    assert "3 of the runs failed: wrong (seed 0), missing (seed 0), two_stage:wrong (seed 0)." in shown.err
    assert "failed: UserError: " in shown.out
    for name, what in (("wrong", "`model.upper_weight` is 2.0"), ("missing", "no_such_setting")):
        assert what in (output / name / "seed0" / "log.txt").read_text()


def test_the_stopwatch_counts_whole_fits_across_a_kill_and_nothing_of_a_test():
    watch = Stopwatch()
    watch.load_state_dict({"seconds": 100.0})  # where the killed part had come to
    watch.on_train_start(None, None)
    watch.on_train_end(None, None)
    assert 100 < watch.seconds < 101
    watch.load_state_dict({"seconds": 30.0})  # the monitor-best checkpoint, which is tested
    assert watch.seconds > 100


def test_the_best_share_is_chosen_on_monitor(small, tmp_path):
    assert compare(small, tmp_path, "--methods", "best:mixing,mixing@0.5", "--pairs", "mixing", "mixing@0.5") == 0
    table = table_of(tmp_path)
    best = min(("mixing", "mixing@0.5"), key=lambda name: float(table[name]["monitor_loss"]))
    assert table["best:mixing,mixing@0.5"]["chosen"] == best
    assert table["best:mixing,mixing@0.5"]["test_loss"] == table[best]["test_loss"]
    assert "exact_match" in table["mixing"]
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == 16
    assert "Chosen by monitor loss" in (tmp_path / "results.md").read_text()


def test_mistakes_are_told_before_anything_runs(small, tmp_path, capsys):
    assert compare(small, tmp_path, "--methods", "mixin") == 2
    assert "unknown method 'mixin'" in capsys.readouterr().err
    assert compare(small, tmp_path, "--methods", "mixing", "--keep", "2") == 2
    assert "`--keep` is 2" in capsys.readouterr().err
    assert compare(small, tmp_path / "none", "--methods", "mixing", "--trainer.limit_train_batches=0.5") == 2
    assert "`trainer.limit_train_batches` is 0.5" in capsys.readouterr().err
    kept = tmp_path / "of_a_user" / "precious.txt"
    kept.parent.mkdir()
    kept.touch()
    assert compare(small, kept.parent, "--methods", "mixing", "--fresh") == 2
    assert "`--fresh` removes earlier comparisons" in capsys.readouterr().err
    assert kept.exists()
    with pytest.raises(UserError, match="another `--output`"):
        Results(tmp_path, {"keep": 0.5})


def test_losses_of_rows_have_the_precision_of_the_run_and_belong_to_its_data(small, tmp_path, monkeypatch, capsys):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(Path(small["pool"]).read_text())
    monkeypatch.chdir(tmp_path)
    asked = ["--methods", "mixing", f"--data.pool={pool}", "--trainer.precision=bf16-mixed"]
    asked += ["--data.truth=lit_bilevel/toy/truth.jsonl", "--subset=80"]  # found in any folder
    assert compare(small, tmp_path / "out", *asked) == 0
    losses = pyarrow.parquet.read_table(tmp_path / "out" / "test_losses.parquet")["mixing"].to_numpy()
    assert np.mean(losses) == pytest.approx(float(table_of(tmp_path / "out")["mixing"]["test_loss"]), rel=1e-6)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[1:]))
    capsys.readouterr()
    assert compare(small, tmp_path / "out", *asked) == 2
    assert "other settings (data)" in capsys.readouterr().err
