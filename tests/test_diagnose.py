"""The diagnosis: what agreement and a rising monitor loss lead to, and one run of the whole command."""

from __future__ import annotations

import json

import pytest
import torch

from lit_bilevel.__main__ import main
from lit_bilevel.comparison.diagnose import advice, agreement, rise


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
    text = "\n".join(advice({**found, "rise": {"whole": risen, "validation_only": None}}))
    assert words in text
    assert "upper_weight_start" in text
    assert "never looked at" in text


def test_the_command_fits_five_times_and_advises(flags, tmp_path, capsys):
    output = tmp_path / "out"
    asked = ["diagnose", *flags[:-1], "--output", str(output), "--trainer.max_steps=3", "--figures.enabled=false"]
    asked += ["--trainer.val_check_interval=1"]
    assert main(asked) == 0
    found = json.loads((output / "diagnosis.json").read_text())
    assert found["validation_rows"] == 30
    assert -1 <= found["halves"] <= 1
    assert found["seeds"] != found["halves"]
    halves = [(output / f"half_{name}_rows" / "validation.jsonl").read_text().splitlines() for name in "ab"]
    assert [len(half) for half in halves] == [15, 15]
    assert not set(halves[0]) & set(halves[1])
    assert "rank correlation" in (output / "diagnosis.md").read_text()
    capsys.readouterr()
    assert main(asked) == 0
    assert capsys.readouterr().out.count(": known") == 5
    assert main([*asked, "--model.solver=Mixing"]) == 2
    assert "learns no weights" in capsys.readouterr().err
