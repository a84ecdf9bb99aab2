"""The diagnosis: what agreement and a rising monitor loss lead to, and one run of the whole command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lit_bilevel.__main__ import main
from lit_bilevel.comparison.diagnose import Diagnosis, advice, agreement, join_weights, rise
from lit_bilevel.comparison.fitting import prepare


def test_agreement_is_of_ranks():
    a = torch.tensor([0.1, 1.0, 5.0, 2.0])
    assert agreement(a, a.exp()) == pytest.approx(1)
    assert agreement(a, -a) == pytest.approx(-1)
    assert agreement(a, torch.ones(4)) == 0


def test_where_a_curve_rises():
    assert rise([]) is None
    assert rise([(9, 3.0), (19, 2.0), (29, 1.999)]) == {"lowest": 30, "last": 30}
    assert rise([(9, 3.0), (19, 2.0), (29, 2.5), (39, 2.01), (49, 2.2)]) == {"lowest": 20, "risen": 50, "last": 50}


@pytest.mark.parametrize(
    ("halves", "seeds", "words"),
    [
        (0.8, 0.9, "large and clean enough"),
        (0.45, 0.85, "more trusted rows"),
        (0.2, 0.25, "cannot be told yet"),
        (0.7, 0.4, "Another order of the pool gives other weights"),
        (0.1, 0.8, "contradict each other"),
    ],
)
def test_advice_depends_on_what_disagrees(halves, seeds, words):
    risen = {"lowest": 20, "risen": 40, "last": 100}
    found = {"validation_rows": 100, "halves": halves, "seeds": seeds, "whole": 0.5}
    found |= {"rise": {"whole": risen, "validation_only": None}, "monitor": None}
    text = "\n".join(advice(found))
    assert words in text
    assert "`upper_weight: 0`" in text
    assert "never looked at" in text


@pytest.mark.parametrize(("error", "warns"), [(0.01, False), (0.1, True), (math.nan, True)])
def test_a_monitor_part_that_judges_badly_is_told(error, warns):
    found = {"validation_rows": 100, "halves": 0.8, "seeds": 0.9, "whole": 0.9, "rise": {}}
    text = "\n".join(advice({**found, "monitor": {"rows": 20, "loss": 2.0, "error": error}}))
    assert "over 20 rows" in text
    assert ("choose badly" in text) == warns


def test_the_command_fits_five_times_and_advises(flags, tmp_path, capsys):
    output = tmp_path / "out"
    asked = ["diagnose", *flags, "--output", str(output), "--trainer.max_steps=3", "--figures.enabled=false"]
    asked += ["--trainer.val_check_interval=1"]
    assert main(asked) == 0
    assert not (tmp_path / "run").exists()  # the folder of the fit whose flags these are
    found = json.loads((output / "diagnosis.json").read_text())
    assert found["validation_rows"] == 30
    assert -1 <= found["halves"] <= 1
    assert found["seeds"] != found["halves"]
    assert found["monitor"]["error"] > 0
    halves = [(output / f"half_{name}_rows" / "validation.jsonl").read_text().splitlines() for name in "ab"]
    assert [len(half) for half in halves] == [15, 15]
    assert not set(halves[0]) & set(halves[1])
    assert "rank correlation" in (output / "diagnosis.md").read_text()
    capsys.readouterr()
    assert main(asked) == 0
    assert capsys.readouterr().out.count(": known") == 5
    assert main([*asked, "--model.solver=Mixing"]) == 2
    assert "learns no weights" in capsys.readouterr().err


def test_weights_are_joined_by_id():
    a, b = join_weights({"x": 1.0, "y": 2.0, "z": 3.0}, {"z": 30.0, "w": 5.0, "x": 10.0})
    assert (a.tolist(), b.tolist()) == ([1, 3], [10, 30])


def test_fits_on_other_data_are_not_known(flags, tmp_path, monkeypatch):
    """Advice leads to another validation file of the same name; the command runs in any folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.jsonl"
    source = next(flag.partition("=")[2] for flag in flags if flag.startswith("--data.validation="))
    asked = [*flags[1:-1], "--data.truth=null", f"--data.validation={path}"]
    folder = tmp_path / "out" / "whole"
    folder.mkdir(parents=True)
    made_of = []
    for rows in (30, 24):
        path.write_text("".join(Path(source).read_text().splitlines(keepends=True)[:rows]))
        diagnosis = Diagnosis("configs/quickstart.yaml", asked, tmp_path / "out", [0, 1])
        prepare(folder, [*diagnosis.shared, *diagnosis.made_of])
        assert not (folder / "done").exists()
        (folder / "done").touch()
        made_of.append(diagnosis.made_of)
    assert made_of[0][0] == made_of[1][0]
    assert made_of[0] != made_of[1]
