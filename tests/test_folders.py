"""Folders are read like their files, and files whatever ends their lines; what is in the fingerprint is the data."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from types import SimpleNamespace

import datasets
import pytest
from support.files import SHARED, write_jsonl
from support.sources import Source
from support.templates import DATED, PLAIN, tokenizer_with

from lit_bilevel.commands.originals import read_pool
from lit_bilevel.comparison.rows import copy_records
from lit_bilevel.data import template
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError


def rows(name: str, count: int) -> list[dict]:
    return [{"id": f"{name}{i}", "prompt": f"{name} {i}", "response": f"r{i}"} for i in range(count)]


def ids(source: Source) -> list[str]:
    return [row.id for row in source.rows()]


NAMES = {  # what `datasets` takes for splits, patterns, or nothing at all
    "train": ["chat.jsonl", "code.jsonl", "train_timetables.jsonl"],
    "test": ["chat.jsonl", "unit_test_questions.jsonl"],
    "validation": ["a-val.jsonl", "dev.jsonl", "eval_x.jsonl", "plain.jsonl"],
    "shards": ["data-00000-of-00002.jsonl", "data-00001-of-00002.jsonl"],
    "folders in it": ["a/train.jsonl", "b/test/x.jsonl", "c.jsonl"],
    "one file": ["only.jsonl"],
}


@pytest.mark.parametrize("folder", ["plain", "run[1]", "a b*?", "ä"])
@pytest.mark.parametrize("case", NAMES)
def test_every_file_of_a_folder_is_read_in_order(tmp_path, caplog, case, folder):
    caplog.set_level("INFO")
    place = tmp_path / folder
    for number, name in enumerate(NAMES[case]):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(place / name, rows(f"{number}-", 4))
    source = Source(str(place))
    expected = [f"{n}-{i}" for n in range(len(NAMES[case])) for i in range(4)]
    assert ids(source) == expected
    assert f"{place}: {len(NAMES[case])} data file" in caplog.text
    assert all(name in caplog.text for name in NAMES[case])
    if len(NAMES[case]) > 1:
        assert {row.source for row in source.rows()} == {name.split("/")[-1][:-6] for name in NAMES[case]}
    assert read_pool([str(place)]).ids == expected
    copied = copy_records(str(place), {}, {1: "x", len(expected) - 1: "y"}, tmp_path / "new")
    assert ids(Source(copied)) == [expected[1], expected[-1]]


def test_files_of_a_folder_are_read_as_they_would_be_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    place = tmp_path / "mixed"
    place.mkdir()
    (place / "a.csv").write_text('id,prompt,response\n007,None,NA\n1,null,1.0\n2,nan,""" "\n')
    write_jsonl(place / "b.jsonl", [{"id": "m", "messages": [{"role": "user", "content": "q"},
                                                             {"role": "assistant", "content": "a"}]}])  # fmt: skip
    (place / "c.json").write_text(json.dumps([{"instruction": "i", "output": "o", "id": "j"}]))
    datasets.Dataset.from_list(rows("p", 2)).to_parquet(place / "d.parquet")
    for name in ("README.md", "NOTES.txt", ".hidden.jsonl", "_temporary.jsonl", "dataset_infos.json"):
        (place / name).write_text("nothing of use")
    found = Source(str(place)).rows()
    assert [(row.id, row.prompt, row.response) for row in found] == [
        ("007", "None", "NA"),
        ("1", "null", "1.0"),
        ("2", "nan", '" '),
        ("m", "q", "a"),
        ("j", "i", "o"),
        ("p0", "p 0", "r0"),
        ("p1", "p 1", "r1"),
    ]
    assert [row.row for row in found] == list(range(7))
    left = "(left alone: NOTES.txt, README.md, dataset_infos.json)"
    assert f"mixed: 4 data files, a.csv, b.jsonl, c.json, d.parquet {left}" in caplog.text
    bad = write_jsonl(place / "e.jsonl", [{"prompt": "x", "response": ""}])
    with pytest.raises(UserError, match=rf"{bad}, line 1: the field `response` is empty"):
        Source(str(place)).rows()


def test_cells_of_a_split_are_texts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    place = tmp_path / "set"
    place.mkdir()
    (place / "train.csv").write_text("id,prompt,response\na,None,NA\nb,null,nan\n")
    expected = [("a", "None", "NA"), ("b", "null", "nan")]
    for path in (place, f"{place}::train", place / "train.csv"):
        assert [(row.id, row.prompt, row.response) for row in Source(str(path)).rows()] == expected


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.tsv", "x.arrow", "x.ndjson", "sub/x.zip"])
def test_data_of_a_kind_that_is_not_read_are_not_left_out_unsaid(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", rows("a", 3))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name} holds data of a kind that is not read"):
        Source(str(tmp_path)).rows()


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"as a folder of data files: there is none of \.json"):
        Source(str(tmp_path)).rows()


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="../shared/cases is absent")
def test_the_files_of_the_reports():
    for name, count in (("folder1", 48), ("folder2", None)):
        folder = SHARED / "cases" / name
        lines = sum(len(path.read_text().splitlines()) for path in folder.iterdir())
        assert count in (None, lines)
        assert len(Source(str(folder)).rows()) == lines
    assert [(row.id, row.prompt, row.response) for row in Source(str(SHARED / "cases" / "n_cr.csv")).rows()] == [
        ("a", "q1", "r1"),
        ("b", "q2", "r2"),
    ]


# ---- ends of lines ----


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "bom"])
def test_lines_end_in_any_way(tmp_path, end, last, mark):
    table = ["id,prompt,response", 'a,q1,"r, 1"', "b,q2,r2", ""]
    lines = [*(json.dumps(record) for record in rows("x", 3000)), ""]
    for name, text in (("p.csv", table), ("p.jsonl", lines)):
        (tmp_path / name).write_bytes((mark + end.join(text if last else text[:-1])).encode())
    assert [(row.id, row.response) for row in Source(str(tmp_path / "p.csv")).rows()] == [("a", "r, 1"), ("b", "r2")]
    found = Source(str(tmp_path / "p.jsonl")).rows()
    assert [row.id for row in found] == [f"x{i}" for i in range(3000)]
    assert found[-1].place.endswith("line 3000")


def test_a_return_inside_a_cell_is_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'id,prompt,response\r\na,q,"one\rtwo"\r\nb,q2,"one\ntwo"\r\n')
    assert [row.response for row in Source(str(path)).rows()] == ["one\rtwo", "one\ntwo"]


# ---- what is not the data ----


def prepared(folder, chat: str | None, **settings) -> BilevelDataModule:
    paths = {name: str(folder / f"{name}.jsonl") for name in ("pool", "validation")}
    data = BilevelDataModule(**paths, cache=False, max_length=200, batch_size=2, **settings)
    data._load_tokenizer = lambda: tokenizer_with(chat)
    data.setup()
    return data


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("pool", "validation"):
        write_jsonl(folder / f"{name}.jsonl", rows(name, 12))
    return folder


@pytest.mark.parametrize("chat", [None, PLAIN, DATED], ids=["none", "plain", "dated"])
def test_a_run_goes_on_tomorrow_elsewhere_and_on_another_machine(place, tmp_path, monkeypatch, chat):
    before = prepared(place, chat).state_dict()

    tomorrow = datetime.datetime(2031, 12, 24, 11, 12, 13, 999)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: tomorrow))
    monkeypatch.setattr(template, "datetime", clock)
    elsewhere = tmp_path / "quite" / "elsewhere"
    shutil.copytree(place, elsewhere)
    for path in elsewhere.iterdir():
        os.utime(path, (1, 1))
    data = prepared(elsewhere, chat, num_proc=2, num_workers=1, pin_memory=False, eval_batch_size=3)
    data.refuse_changes(before)
    if chat == DATED:
        assert "2031" in tokenizer_with(chat).decode(data.sets["pool"][0]["input_ids"])


def test_what_is_the_data_is_still_told(place, monkeypatch):
    before = prepared(place, PLAIN).state_dict()

    def refused(chat=PLAIN, **settings) -> str:
        with pytest.raises(UserError) as caught:
            prepared(place, chat, **settings).refuse_changes(before)
        return str(caught.value)

    assert "the chat template (digest) is" in refused("#" + PLAIN)
    assert "other ids, texts or tokens" in refused(PLAIN.replace("m.content +", "m.content + '!' +"))
    for name, value in (("prompt", "other"), ("response", "other"), ("id", "other"), ("system", "other")):
        records = rows("pool", 12)
        records[5][name] = value
        write_jsonl(place / "pool.jsonl", records)
        assert "`data.pool`" in refused()
