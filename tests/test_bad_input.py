"""Bad input: every class, in every kind of file, at both levels; and whatever else a fuzzer finds."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import TOY, Source, read_jsonl, write_jsonl
from transformers import AutoTokenizer

from lit_bilevel.data import files
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

GOOD = [{"id": f"g{i}", "prompt": f"good {i}", "response": "fine"} for i in range(10)]
BAD = {  # a record beside good ones, and what is said of it
    "missing field": ({"id": "b", "prompt": "x", "response": None}, "the field `response` is"),
    "empty prompt": ({"id": "b", "prompt": "", "response": "r"}, "the field `prompt` is empty"),
    "white space": ({"id": "b", "prompt": "x", "response": " \n\t"}, "the field `response` is empty"),
    "duplicate id": ({"id": "g1", "prompt": "x", "response": "r"}, "the id 'g1' was already used on"),
    "duplicate row": ({"id": "b", "prompt": "good 1", "response": "fine"}, "the same prompt and response as on"),
    "long prompt": ({"id": "b", "prompt": "x" * 90, "response": "r"}, "the prompt alone has"),
    "special token": ({"id": "b", "prompt": "x<eos>", "response": "r"}, "control token"),
}
PLACES = {".jsonl": "line 12", ".json": "record 12", ".csv": "line 13", ".parquet": "row 12"}
TWELVE = [*GOOD, {"id": "g11", "prompt": "good 11", "response": "fine"}]


def write(path, records) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "response"])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        write_jsonl(path, records)
    return str(path)


def module(bad: str, level: str, tmp_path, **settings) -> BilevelDataModule:
    other = [r | {"prompt": f"other {i}"} for i, r in enumerate(GOOD)]
    clean = write_jsonl(tmp_path / "clean.jsonl", other)
    pool, validation = (bad, clean) if level == "lower" else (clean, bad)
    return BilevelDataModule(pool, validation, tokenizer=str(TOY / "model"), max_length=64, **settings)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("suffix", PLACES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_counted(tmp_path, name, suffix, level):
    record, message = BAD[name]
    path = write(tmp_path / f"bad{suffix}", [*TWELVE, record])
    with pytest.raises(UserError) as caught:
        module(path, level, tmp_path).setup()
    for part in (message, f"{path}, {PLACES[suffix]}", "on_bad_row: skip"):
        assert part in str(caught.value)
    data = module(path, level, tmp_path, on_bad_row="skip")
    data.setup()
    skipped = [problem for problems in data.skipped.values() for problem in problems]
    assert len(skipped) == 1
    assert f"{path}, {PLACES[suffix]}" in skipped[0]
    kept = [id for name in (("pool",) if level == "lower" else ("upper", "monitor")) for id in data.sets[name]["id"][:]]
    assert sorted(kept) == sorted(row["id"] for row in TWELVE)


LINES = {  # bytes of the second line of a jsonl file
    "malformed": (b'{"prompt": "a", ', "not valid JSON"),
    "encoding": (b'{"prompt": "\xff", "response": "r"}', "not UTF-8"),
    "surrogate": (b'{"prompt": "\\ud800", "response": "r"}', "not UTF-8 text"),
    "type": (b'{"prompt": ["a"], "response": "r"}', "list, not a string"),
    "no object": (b"[1, 2]", "a list, not an object"),
    "huge number": (b'{"prompt": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "huge line": (b'{"prompt": "' + b"x" * 300_000 + b'"}', "longer than 200000 bytes"),
    "id": (b'{"id": [1], "prompt": "a", "response": "r"}', "the field `id` is list"),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_wherever_it_stands(tmp_path, monkeypatch, name, place):
    monkeypatch.setattr(files, "MAX_LINE", 200_000)
    line, message = LINES[name]
    lines = [b'{"prompt": "p", "response": "r"}']
    lines.insert(place, line)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=rf"p\.jsonl, line {place + 1}: .*{message}"):
        Source(str(path)).rows()
    source = Source(str(path), on_bad_row="skip")
    assert [row.prompt for row in source.rows()] == ["p"]
    assert len(source.skipped) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty|not a readable parquet"),
        (b"\x00\x01\x02" * 99, "is a binary file|not a readable parquet"),
        ('{"prompt": "p"}'.encode("utf-16"), "is UTF-16|not a readable parquet"),
        (b"\x1f\x8b" + b"gz" * 9, "is a binary file|not a readable parquet"),
    ],
)
def test_files_that_cannot_be_read_are_refused_also_under_skip(tmp_path, suffix, content, message):
    path = tmp_path / f"p{suffix}"
    path.write_bytes(content)
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=message):
            Source(str(path), on_bad_row=policy).rows()


@pytest.mark.parametrize(
    ("line", "message"),
    [("a,b,c", "3 fields where the first line names 2"), ('"a"x,b', "not valid CSV"), ("a", "1 fields")],
)
def test_bad_lines_of_a_csv_file(tmp_path, line, message):
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,response\np,r\n{line}\n\nq,r\n")
    with pytest.raises(UserError, match=rf"line 3: .*{message}"):
        Source(str(path)).rows()
    assert [row.prompt for row in Source(str(path), on_bad_row="skip").rows()] == ["p", "q"]


def test_a_byte_order_mark_is_no_content(tmp_path):
    for suffix, text in ((".jsonl", '{"prompt": "p", "response": "r"}'), (".csv", "prompt,response\np,r")):
        path = tmp_path / f"p{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert Source(str(path)).rows()[0].prompt == "p"


def test_twenty_problems_are_named_and_the_rest_counted(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD[0], *({"prompt": "", "response": "r"} for _ in range(30))])
    with pytest.raises(UserError, match=r"30 problems(?s:.*)line 21: (?s:.*)and 10 more"):
        Source(path).rows()


def test_tokenizers_without_eos_are_refused_and_without_pad_are_not():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    row = Row(0, "a", "add: 1+1", "2", "")
    expected = Encoder(tokenizer, 64).rows([row])
    tokenizer.pad_token = None
    assert Encoder(tokenizer, 64).rows([row]) == expected
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(tokenizer, 64)


def test_a_pool_smaller_than_a_step_is_refused(tmp_path):
    data = module(write_jsonl(tmp_path / "p.jsonl", GOOD), "lower", tmp_path, batch_size=11)
    data.setup()
    with pytest.raises(UserError, match=r"10 rows and a policy step takes 11.*batch_size"):
        data.train_dataloader()


def test_skipped_rows_are_listed_in_the_run_folder(tmp_path):
    from lit_bilevel.data.report import write_skipped

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
        st.binary(max_size=30).filter(lambda part: b"\n" not in part),
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
