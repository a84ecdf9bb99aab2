"""Data: reading, refusing, encoding, and splitting."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from support.files import SHARED, TOY, read_jsonl, write_jsonl
from support.sources import Source, module
from transformers import AutoTokenizer

from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.split import split
from lit_bilevel.errors import UserError
from lit_bilevel.types import Row

GOOD = {"id": "a", "prompt": "add: 1+1", "response": "2", "source": "add"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    records = read_jsonl(TOY / "pool.jsonl")[:20]
    path = tmp_path / f"pool.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, records)
    elif suffix == "json":
        path.write_text(json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    rows = Source(str(path)).rows()
    assert [(row.id, row.prompt, row.response, row.source) for row in rows] == [
        (r["id"], r["prompt"], r["response"], r["source"]) for r in records
    ]
    assert [row.row for row in rows] == list(range(20))


def test_id_and_source_are_optional_and_columns_can_be_renamed(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "answer": "r"}, {"question": "q2", "answer": "r2"}])
    rows = Source(path, columns={"question": "prompt", "answer": "response"}).rows()
    assert rows == [Row(0, "0", "q", "r", ""), Row(1, "1", "q2", "r2", "")]


BAD = {
    "missing": ({"id": "b", "prompt": "x"}, "the field `response` is missing"),
    "empty": (GOOD | {"id": "b", "response": "  "}, "the field `response` is empty"),
    "type": (GOOD | {"id": "b", "prompt": 3}, "the field `prompt` is int, not a string"),
    "duplicate": (GOOD, "the id 'a' was already used"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_with_its_line(tmp_path, name):
    record, message = BAD[name]
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD, record])
    with pytest.raises(UserError, match="line 2") as caught:
        Source(path).rows()
    assert message in str(caught.value)
    assert path in str(caught.value)
    source = Source(path, on_bad_row="skip")
    assert [row.id for row in source.rows()] == ["a"]
    assert len(source.skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{broken\n", "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"[1]\n", "not an object"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Source(str(path)).rows()


def test_unknown_columns_are_refused_with_the_remedy(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"x": "1", "y": "2"}])
    with pytest.raises(UserError, match=r"fit no known format.*data\.columns"):
        Source(path).rows()


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        Source("nowhere.jsonl").rows()


@pytest.fixture(scope="module")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "model")


def test_plain_template_masks_the_prompt_and_learns_eos(toy_tokenizer):
    encoded = Encoder(toy_tokenizer, 64).rows([Row(0, "a", "add: 1+1", "2", "")])[0]
    prompt = toy_tokenizer("add: 1+1\n", add_special_tokens=False).input_ids
    answer = toy_tokenizer("2", add_special_tokens=False).input_ids
    assert encoded.input_ids == [*prompt, *answer, toy_tokenizer.eos_token_id]
    assert encoded.response_start == len(prompt)
    assert not encoded.truncated


def test_truncation_is_flagged_and_takes_eos(toy_tokenizer):
    encoded = Encoder(toy_tokenizer, 12).rows([Row(0, "a", "add: 1+1", "2" * 40, "")])[0]
    assert len(encoded.input_ids) == 12
    assert encoded.truncated
    assert encoded.input_ids[-1] != toy_tokenizer.eos_token_id


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared base model")
def test_chat_template_gives_the_ids_of_transformers():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
    row = Row(0, "a", "What is a cat?", "An animal.", "")
    messages = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = Encoder(tokenizer, 64).rows([row])[0]
    assert encoded.input_ids == expected["input_ids"]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.response_start == expected["assistant_masks"].index(1)
    assert Encoder(tokenizer, 64).prompts([row.prompt]) == [encoded.input_ids[: encoded.response_start]]


def test_a_prompt_that_fills_the_context_is_refused(tmp_path):
    long = write_jsonl(tmp_path / "p.jsonl", [GOOD, GOOD | {"id": "long", "prompt": "z" * 50}])
    data = BilevelDataModule(long, str(TOY / "validation.jsonl"), tokenizer=str(TOY / "model"), max_length=30)
    with pytest.raises(UserError, match=r"line 2, id 'long': no response token fits"):
        data.setup()


def test_a_rename_of_a_field_that_no_file_has_is_refused(small, tmp_path):
    pool = [{**record, "question": record["prompt"]} for record in read_jsonl(Path(small["pool"]))]
    for record in pool:
        del record["prompt"]
    files = {**small, "pool": write_jsonl(tmp_path / "pool.jsonl", pool)}
    columns = {"question": "prompt"}  # the validation file has `prompt` itself
    for _ in range(2):  # the second time the sets are read from the cache
        module(files, columns=columns).setup()
        with pytest.raises(UserError, match=r"`data.columns` renames 'quesion', and no record of any file"):
            module(files, columns=columns | {"quesion": "system"}).setup()


def test_validation_is_split_by_id_whatever_the_order(small, tmp_path):
    first = module(small)
    first.setup()
    shuffled = write_jsonl(tmp_path / "v.jsonl", read_jsonl(Path(small["validation"]))[::-1])
    second = module(small | {"validation": shuffled})
    second.setup()
    for name in ("upper", "monitor"):
        assert set(first.sets[name]["id"]) == set(second.sets[name]["id"])
    assert not set(first.sets["upper"]["id"]) & set(first.sets["monitor"]["id"])
    assert len(first.sets["monitor"]) == 6


def test_overlap_with_the_pool_is_refused(small, tmp_path):
    rows = read_jsonl(Path(small["validation"]))
    rows[3]["prompt"] = read_jsonl(Path(small["pool"]))[0]["prompt"]
    leaky = write_jsonl(tmp_path / "v.jsonl", rows)
    with pytest.raises(UserError, match=r"share no prompt with the pool.*" + rows[3]["id"]):
        module(small | {"validation": leaky}).setup()


def test_a_validation_file_of_one_row_is_refused(small, tmp_path):
    one = write_jsonl(tmp_path / "v.jsonl", [GOOD | {"prompt": "unseen"}])
    with pytest.raises(UserError, match="too few to split"):
        module(small | {"validation": one}).setup()


def test_the_test_file_may_share_no_prompt_with_validation(small, tmp_path):
    """Else the policy is tested on rows that it was chosen by; `skip` leaves them out of validation."""
    rows = read_jsonl(Path(small["validation"]))
    test = write_jsonl(tmp_path / "test.jsonl", [{**rows[3], "id": "other"}, *read_jsonl(Path(small["test"]))])
    settings = {"tokenizer": str(TOY / "model"), "max_length": 64, "cache": False}
    with pytest.raises(UserError, match="share no prompt with validation.*" + rows[3]["id"]):
        BilevelDataModule(small["pool"], small["validation"], test, **settings).setup("fit")
    data = BilevelDataModule(small["pool"], small["validation"], test, on_bad_row="skip", **settings)
    data.setup("fit")
    assert len(data.sets["upper"]) + len(data.sets["monitor"]) == len(rows) - 1
    assert len(data.skipped["validation"]) == 1


def test_equal_prompts_are_not_parted_by_the_split():
    ids = [f"row{number}" for number in range(40)]
    table = Dataset.from_dict({"id": ids, "question": [bytes([number // 4]) for number in range(40)]})
    upper, monitor = split(table, 0.2)
    assert (len(upper), len(monitor)) == (32, 8)
    assert not set(upper["question"]) & set(monitor["question"])
