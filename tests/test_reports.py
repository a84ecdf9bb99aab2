"""Kinds of trouble from public reports on tools of this sort, each tried here."""

from __future__ import annotations

import json

import datasets
import pytest
from support.files import write_jsonl
from support.sources import Source
from support.templates import PLAIN, SAME, learned, reference, tokenizer_with

from lit_bilevel.cli import main
from lit_bilevel.data.encode import Encoder
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encoded(tmp_path, template, record: dict, **settings):
    tokenizer = tokenizer_with(template)
    row = Source(write_jsonl(tmp_path / "p.jsonl", [record])).rows()[0]
    return tokenizer, Encoder(tokenizer, **{"max_length": 400, **settings}).rows([row])[0]


@pytest.mark.parametrize("template", [None, *SAME.values()])
def test_an_answer_that_stands_in_the_question_or_an_earlier_answer_too(tmp_path, template):
    messages = turns("yes or no? yes", "yes", "yes or no?", "yes", "say [assistant] yes", "yes")
    for train_on, wanted in (("last", [5]), ("all", [1, 3, 5])):
        tokenizer, made = encoded(tmp_path, template, {"messages": messages}, train_on=train_on)
        text, parts = reference(tokenizer, messages, wanted)
        assert tokenizer.decode(made.input_ids) == text
        assert learned(tokenizer, made) == parts == ["yes<eos>"] * len(wanted)


def test_an_answer_that_is_cut_away_is_no_row_of_loss_zero(tmp_path):
    record = {"prompt": "a long question " * 9, "completion": "12"}
    for length in (16, 48, 128):
        assert "no response token fits" in str(encoded(tmp_path, PLAIN, record, max_length=length)[1])


def test_a_template_that_ends_turns_otherwise_than_the_tokenizer(tmp_path):
    template = PLAIN.replace("eos_token", "'<end>'")
    tokenizer, made = encoded(tmp_path, template, {"messages": turns("q", "a", "r", "b")}, train_on="all")
    assert learned(tokenizer, made) == ["a<end>", "b<end><eos>"]  # its own end, and the one that generation stops at


def test_an_answer_with_white_space_at_its_ends(tmp_path):
    tokenizer, made = encoded(tmp_path, PLAIN, {"prompt": "q", "response": "  def f():\n    return 1\n"})
    assert learned(tokenizer, made) == ["  def f():\n    return 1\n<eos>"]


def test_columns_that_are_empty_at_first(tmp_path):
    records = [{"prompt": f"q{i}", "response": "r", "tools": None, "meta": []} for i in range(3000)]
    records += [{"prompt": "last", "response": "r", "tools": None, "meta": [{"a": "b"}], "system": "s"}]
    place = tmp_path / "folder"
    place.mkdir()
    write_jsonl(place / "a.jsonl", records)
    write_jsonl(place / "b.jsonl", [{"prompt": "other", "response": "r", "meta": "text"}])
    rows = Source(str(place)).rows()
    assert [row.prompt for row in rows[-3:]] == ["q2999", "last", "other"]
    assert rows[-2].history == (("system", "s"),)


def test_texts_that_look_like_something_else(tmp_path):
    texts = ["2024-01-01T00:00:00Z", "0.0", "1e5", "True", "null", '{"a": 1}', "[1]", "a\u2028b", "a\x85b", "a\tb"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text, "response": text} for text in texts])
    rows = Source(path).rows()
    assert [row.prompt for row in rows] == [row.response for row in rows] == texts
    table = datasets.Dataset.from_list([{"prompt": row.prompt, "response": row.response} for row in rows])
    table.to_parquet(tmp_path / "p.parquet")
    assert [row.prompt for row in Source(str(tmp_path / "p.parquet")).rows()] == texts


def test_token_ids_in_the_place_of_texts_are_named(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"input_ids": [1], "attention_mask": [1], "labels": [1]}])
    with pytest.raises(UserError, match=r"the columns .*'input_ids', 'labels'.* fit no known format"):
        Source(path).rows()


def test_a_key_that_stands_twice_in_an_object_is_refused(tmp_path):
    for suffix, text in ((".jsonl", '{"prompt": "q", "response": "a", "response": "b"}'),
                         (".json", '[{"prompt": "q", "response": "a", "response": "b"}]')):  # fmt: skip
        path = tmp_path / f"p{suffix}"
        path.write_text(text)
        with pytest.raises(UserError, match=r"the key 'response' stands twice"):
            Source(str(path)).rows()


def test_numbers_that_json_lacks_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "q", "response": NaN}')
    with pytest.raises(UserError, match="line 1: the field `response` is float"):
        Source(str(path)).rows()


def test_a_finished_run_that_is_continued_says_that_nothing_is_left(flags, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    short = [*flags, "--trainer.max_steps=4", "--figures.enabled=false"]
    assert main(["fit", *short]) == 0
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    caplog.clear()
    with pytest.warns(UserWarning, match=r"is finished \(4 policy steps\), so no step was made; raise `trainer.max_"):
        assert main(["fit", *short, "--ckpt_path=last"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == first


def test_two_rows_that_differ_in_tools_alone_are_two(tmp_path):
    call = {"function": {"name": "f", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": name}} for name in "ab"]
    records = [{"messages": turns("q", "a"), "tools": [tool]} for tool in tools]
    records.append({"messages": [*turns("q"), {"role": "assistant", "content": "a", "tool_calls": [call]}]})
    assert len(Source(write_jsonl(tmp_path / "p.jsonl", records)).rows()) == 3


def test_a_plain_row_has_the_words_it_had():
    assert Row(0, "a", "q", "r", "").details == ""
