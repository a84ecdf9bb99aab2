"""Rounds of a run against the truth: shares and AUROC with known values, on the terminal and on the page."""

from __future__ import annotations

import json

import pytest
from conftest import write_jsonl

from lit_bilevel.commands.inspect import main as inspect
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.rounds import judge_rounds
from lit_bilevel.refinement.alike import SameAnswer


@pytest.fixture
def run(tmp_path):
    """Two questions in two rounds; the first one's old answer is wrong, the second one's right."""

    def answer(row, round, sample, text, agreement, used, logprob):
        known = {"id": f"r{row}", "row": row, "round": round, "sample": sample, "response": text}
        known |= {"token_ids": [1, 2], "token_logprobs": [0, 0], "logprob": logprob, "finished": True}
        return known | {"agreement": agreement, "used": used, "temperature": 1.0}

    answers = [
        answer(0, 1, 0, "8", 1.0, True, -1.0),
        answer(0, 1, 1, "8.0", 1.0, True, -1.0),
        answer(1, 1, 0, "5", 0.0, False, -3.0),
        answer(1, 1, 1, "9", 0.0, False, -5.0),
        answer(0, 2, 0, "<b>7", 0.0, False, -1.0),
        answer(0, 2, 1, "8", 0.0, False, -2.0),
    ]
    folder = tmp_path / "run"
    (folder / "inspection").mkdir(parents=True)
    write_jsonl(folder / "responses.jsonl", answers)
    weighed = [
        {"round": 1, "row": 0, "used": n, "weights": {"Token": w, "group": 1.5}} for n, w in ((0, 1.2), (1, 0.8))
    ]
    write_jsonl(folder / "inspection" / "response_weights.jsonl", weighed)
    verdict = {"least": 1.0, "reason": "so", "new_right": 0.9, "old_right": 0.4}
    cost = {"step": 4, "rows": 1.0, "used": 0.5, "tokens_per_second": 20.0, "share_of_time": 0.25}
    rounds = [{"round": 1, "verdict": verdict, **cost}, {"round": 2, "verdict": verdict | {"least": None}, **cost}]
    write_jsonl(folder / "inspection" / "rounds.jsonl", rounds)
    write_jsonl(folder / "inspection" / "epochs.jsonl", [{"step": 4, "epoch": 0}])
    shown = [{"id": f"r{row}", "row": row, "prompt": f"{row} + 1?", "response": "6", "weight": 0.1} for row in (0, 1)]
    write_jsonl(folder / "inspection" / "refined.jsonl", shown)
    truth = [
        {"id": "r0", "corrupted": 1, "original_response": "8"},
        {"id": "r1", "corrupted": 0, "original_response": "6"},
    ]
    write_jsonl(tmp_path / "truth.jsonl", truth)
    return folder


def test_rounds_are_judged_by_the_truth(run, tmp_path):
    first, second = judge_rounds(run, str(tmp_path / "truth.jsonl"), SameAnswer())
    assert (first.round, first.rows, first.replaced) == (1, 2, 1)
    assert (first.old_right, first.replaced_right) == (0.5, 0.0)
    assert (first.new_right, first.used_right, first.agree_right, first.differ_right) == (0.5, 1.0, 1.0, 0.0)
    assert first.auroc == {
        "agreement": 1.0,
        "log-probability": 1.0,
    }  # both that were used are right: no AUROC of weights
    assert (second.replaced, second.new_right, second.auroc["log-probability"]) == (0, 0.5, 0.0)
    assert second.used_right != second.used_right


def test_the_report_lets_a_person_judge(run, tmp_path, capsys):
    assert inspect(["inspect", str(run), "--truth", str(tmp_path / "truth.jsonl")]) == 0
    printed = capsys.readouterr().out
    page = (run / "inspect.html").read_text()
    for text in ("trusted from an agreement of 100% on", "left out", "right answers, by the truth file", "counts now"):
        assert text in printed
    for text in ("Right answers, by the truth file", "AUROC of right new answers", "weight 0.1", "old answer"):
        assert text in page
    assert "8  (agreement 0.00, log p -1.00)" in printed
    assert "&lt;b&gt;7" in page
    assert "<b>7" not in page


def test_a_truth_of_other_rows_is_refused(run, tmp_path, capsys):
    (tmp_path / "truth.jsonl").write_text(json.dumps({"id": "r0", "corrupted": 1, "original_response": "8"}) + "\n")
    with pytest.raises(UserError, match="'r1'"):
        judge_rounds(run, str(tmp_path / "truth.jsonl"), SameAnswer())
    assert inspect(["inspect", str(run), "--truth", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err
