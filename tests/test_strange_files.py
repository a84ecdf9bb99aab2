"""Files with marks, long lines or bytes of any kind: read, named, or refused; and what tokenizers must have."""

from __future__ import annotations

import json

import pytest
from support.files import TOY, read_jsonl
from support.sources import Source
from transformers import AutoTokenizer

from lit_bilevel.data import files
from lit_bilevel.data.announce import write_skipped
from lit_bilevel.data.encode import Encoder
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row


def test_a_csv_line_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,response\np,r\nq,{'r' * 2000}\n")
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=r"p\.csv, line 3: longer than 1000 bytes"):
            Source(str(path), on_bad_row=policy).rows()


def test_a_byte_order_mark_is_no_content(tmp_path):
    for suffix, text in ((".jsonl", '{"prompt": "p", "response": "r"}'), (".csv", "prompt,response\np,r")):
        path = tmp_path / f"p{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert Source(str(path)).rows()[0].prompt == "p"


def test_tokenizers_without_eos_are_refused_and_without_pad_are_not():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")  # one of its own, for it is spoilt
    row = Row(0, "a", "add: 1+1", "2", "")
    expected = Encoder(tokenizer, 64).rows([row])
    tokenizer.pad_token = None
    assert Encoder(tokenizer, 64).rows([row]) == expected
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(tokenizer, 64)


def test_skipped_rows_are_listed_in_the_run_folder(tmp_path):
    write_skipped(tmp_path / "run", {"pool": ["p.jsonl, line 2: é"], "upper": []})
    assert read_jsonl(tmp_path / "run" / "skipped.jsonl") == [{"set": "pool", "problem": "p.jsonl, line 2: é"}]
    write_skipped(tmp_path / "run", {"pool": []})
    assert not list((tmp_path / "run").iterdir())


def test_nothing_but_a_user_error_comes_out_of_any_file(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    text = st.text(st.characters(codec=None), max_size=8)
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    )
    names = st.sampled_from(["id", "prompt", "response", "messages", "conversations", "instruction", "output", "text"])
    line = st.one_of(
        st.dictionaries(names | text, value, max_size=5).map(lambda record: json.dumps(record).encode()),
        st.builds(lambda p, r: json.dumps({"prompt": p, "response": r}).encode(), text, text),
        st.binary(max_size=30).filter(lambda part: not {*b"\r\n"} & {*part}),  # each ends a line
    )
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    encoder = Encoder(tokenizer, 24)

    @hypothesis.settings(max_examples=150, deadline=None, database=None)
    @hypothesis.given(st.lists(line, max_size=5), st.sampled_from([".jsonl", ".csv", ".json"]))
    def check(lines, suffix):
        path = tmp_path / f"fuzz{suffix}"
        path.write_bytes(b"\n".join(lines))
        source = Source(str(path), on_bad_row="skip")
        try:
            rows = source.rows()
        except UserError:
            return
        if suffix == ".jsonl":
            assert len(rows) + len(source.skipped) == sum(bool(part.strip()) for part in lines)
            for row in rows:
                record = json.loads(lines[int(row.place.rsplit(" ", 1)[1]) - 1].decode("utf-8-sig"))
                if "prompt" in record and isinstance(record["prompt"], str) and "response" in record:
                    assert (row.prompt, row.response) == (record["prompt"], record["response"])
        for row, encoded in zip(rows, encoder.rows(rows), strict=True):
            assert isinstance(encoded, ValueError) or 0 < encoded.response_start < len(encoded.input_ids) <= 24, row

    check()
