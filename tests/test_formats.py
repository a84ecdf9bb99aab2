"""Formats in every kind of file: detected, read, renamed, several files as one source."""

from __future__ import annotations

import datasets
import pytest
from jsonargparse import ArgumentParser
from support.files import TOY, write_jsonl
from support.formats import LONG, RECORDS, SHORT, as_messages, read, write
from support.sources import Source

from lit_bilevel.data.formats import Preference
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError


@pytest.mark.parametrize("name", RECORDS)
def test_formats_are_detected_and_read(tmp_path, name):
    expected, record, turns = RECORDS[name]
    source = Source(write_jsonl(tmp_path / "p.jsonl", [record | {"id": 7, "source": "s"}]))
    row = source.rows()[0]
    assert list(source.formats.values()) == [expected]
    assert [*row.turns, ("assistant", row.response)] == turns
    assert (row.id, row.source, row.row) == ("7", "s", 0)
    assert row == read(tmp_path, record | {"id": 7, "source": "s"}, format=expected)


MANY = [{"id": f"r{i}", "prompt": f'say "{i}",\nplease é', "response": "x" * (1 + i * 70_000)} for i in range(3)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ""])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = Source(write(tmp_path / f"p{suffix}", MANY)).rows()
    assert [(row.id, row.prompt, row.response) for row in rows] == [tuple(r.values()) for r in MANY]
    assert all(row.place.startswith(str(tmp_path)) for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ""])
@pytest.mark.parametrize("name", RECORDS)
def test_every_format_in_every_kind_of_file(tmp_path, name, suffix):
    _, record, turns = RECORDS[name]
    row = Source(write(tmp_path / f"p{suffix}", [record])).rows()[0]
    assert [*row.turns, ("assistant", row.response)] == turns


def test_several_files_are_one_source_and_name_their_rows(tmp_path):
    first = write_jsonl(tmp_path / "web.jsonl", [{"prompt": "a", "response": "b"}])
    second = write(tmp_path / "books.csv", [{"instruction": "c", "output": "d"}, {"instruction": "e", "output": "f"}])
    source = Source([first, second])
    assert [(row.row, row.id, row.prompt, row.source) for row in source.rows()] == [
        (0, "0", "a", "web"),
        (1, "1", "c", "books"),
        (2, "2", "e", "books"),
    ]
    assert list(source.formats.values()) == ["prompt_response", "alpaca"]
    assert Source([first]).rows()[0].source == ""


def test_several_splits_in_a_folder_are_named(tmp_path):
    records = datasets.Dataset.from_list(MANY)
    datasets.DatasetDict({"train": records, "test": records}).save_to_disk(tmp_path / "all")
    with pytest.raises(UserError, match=r"several splits.*all/test, .*all/train"):
        Source(str(tmp_path / "all")).rows()
    assert len(Source(str(tmp_path / "all" / "train")).rows()) == 3


def test_preference_pairs_are_read_and_the_chosen_answer_is_learned(tmp_path):
    other = [*LONG[:-1], ("assistant", "A wolf.")]
    for record in (
        {"prompt": "And a dog?", "chosen": "Another.", "rejected": "A wolf."},
        {"prompt": as_messages(LONG[:-1]), "chosen": as_messages(LONG[-1:]), "rejected": as_messages(other[-1:])},
        {"prompt": "And a dog?", "chosen": as_messages(LONG), "rejected": as_messages(other), "messages": []},
    ):
        turns, chosen, rejected = Preference().pair(record)
        assert [turn[:2] for turn in turns] in (LONG[:-1], LONG[3:4])
        assert (chosen, rejected) == ("Another.", "A wolf.")
        assert read(tmp_path, record).response == "Another."
    for bad, message in (
        ({"chosen": "b", "rejected": "c"}, "`prompt` is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"chosen": as_messages(LONG), "rejected": as_messages(SHORT)}, "do not answer the same question"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{message}"):
            read(tmp_path, bad)


def test_renames_may_not_hide_a_column(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "response": "b", "answer": "c"}])
    with pytest.raises(UserError, match="two columns the same name"):
        Source(path, columns={"answer": "response"}).rows()


def test_an_overlap_is_found_in_conversations_whatever_their_format(tmp_path):
    toy = str(TOY / "model")
    pool = [{"prompt": f"q{i}", "response": "r"} for i in range(6)]
    chat = [as_messages([("system", "s"), ("user", f" q{i} "), ("assistant", "other")]) for i in range(4, 9)]
    files = (
        write_jsonl(tmp_path / "p.jsonl", pool),
        write_jsonl(tmp_path / "v.jsonl", [{"messages": m} for m in chat]),
    )
    with pytest.raises(UserError, match=r"share no prompt with the pool"):
        BilevelDataModule(*files, tokenizer=toy).setup()
    data = BilevelDataModule(*files, tokenizer=toy, on_bad_row="skip")
    data.setup()
    assert data.sets["pool"]["id"][:] == ["0", "1", "2", "3"]
    assert len(data.skipped["pool"]) == 2


def test_one_file_or_several_on_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BilevelDataModule, "data")
    for given, expected in (("a.jsonl", "a.jsonl"), ("[a.jsonl, b.csv]", ["a.jsonl", "b.csv"])):
        flags = [f"--data.pool={given}", "--data.validation=v.jsonl", "--data.truncation=left", "--data.train_on=all"]
        assert parser.parse_args(flags).data.pool == expected
