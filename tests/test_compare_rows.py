"""Rows of a comparison: records copied into new files, subsets, and what answers are measured by."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.files import read_jsonl, write_jsonl

from lit_bilevel.comparison import answers
from lit_bilevel.comparison.rows import copy_records, stratify
from lit_bilevel.errors import UserError

# ---- rows ----


def test_records_are_copied_with_their_history_and_their_ids(tmp_path):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    first = write_jsonl(tmp_path / "one.jsonl", [{"messages": turns}, {"messages": turns[2:] + turns[:2]}])
    second = write_jsonl(tmp_path / "two.jsonl", [{"prompt": "p", "response": "r", "key": "k", "more": [1]}])
    files = copy_records([first, second], {"key": "id"}, {1: "1", 2: "k"}, tmp_path / "new")
    assert [Path(file).name for file in files] == ["one.jsonl", "two.jsonl"]  # their names are their rows' sources
    assert [record for file in files for record in read_jsonl(Path(file))] == [
        {"messages": turns[2:] + turns[:2], "id": "1"},
        {"prompt": "p", "response": "r", "key": "k", "more": [1]},
    ]
    assert isinstance(copy_records(second, {}, {0: "0"}, tmp_path / "single"), str)


def test_a_subset_has_the_proportions_of_the_whole():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    rows = stratify(strata, 20, seed=0)
    assert [sum(strata[i] == name for i in rows) for name in "abc"] == [12, 6, 2]
    assert rows.tolist() == stratify(strata, 20, seed=0).tolist() != stratify(strata, 20, seed=1).tolist()
    with pytest.raises(UserError, match="`--subset` is 200"):
        stratify(strata, 200, seed=0)


# ---- answers ----


def test_refusals_are_told_by_set_phrases():
    for text in ("I'm sorry, but no.", "I can’t help with that.", "I have to decline this request.", "Sorry, no."):
        assert answers.refuses(text), text
    for text in ("Sure! It is easy.", "We cannot see the chair. The answer is no.", "x" * 300 + "I cannot help."):
        assert not answers.refuses(text), text


def test_measures_of_answers():
    same = ["the cat sat on the mat", "a b c d e f"]
    found = answers.measures(same, same, ["comply", None])
    assert found == {"exact_match": 1, "bleu": pytest.approx(1), "rougeL": pytest.approx(1), "over_refusal": 0}
    found = answers.measures(["7", "I cannot help."], ["8", "9"], ["comply", "refuse"])
    assert (found["exact_match"], found["refusal"], found["over_refusal"]) == (0, 1, 0)
    assert "bleu" not in found  # references of one word


def test_pairs_show_both_answers_in_either_order(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        records = [{"id": str(i), "prompt": "p", "response": f"{name}{i}"} for i in range(40)]
        write_jsonl(tmp_path / name / "predictions.jsonl", records)
    assert answers.write_pairs(tmp_path / "a", tmp_path / "b", ("A", "B"), tmp_path / "pairs.jsonl") == 40
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    assert all(pair[f"answer_{k}"][0] == pair[f"method_{k}"].lower() for pair in pairs for k in (1, 2))
    assert 5 < sum(pair["method_1"] == "A" for pair in pairs) < 35
    with pytest.raises(UserError, match="--answers"):
        answers.write_pairs(tmp_path / "a", tmp_path / "c", ("A", "C"), tmp_path / "pairs.jsonl")
