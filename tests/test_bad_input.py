"""Bad records and lines: every class, in every kind of file, at both levels."""

from __future__ import annotations

import csv
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.files import TOY, read_jsonl, write_jsonl
from support.sources import Source
from transformers import AutoTokenizer

from lit_bilevel.cli import main
from lit_bilevel.data import files, formats
from lit_bilevel.data.announce import write_skipped
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError

GOOD = [{"id": f"g{i}", "prompt": f"good {i}", "response": "fine"} for i in range(11)]

ROOM = 64
"""`max_length`; the toy tokenizer has a token a byte, and puts a line's end after the prompt."""

RECORDS = {  # a record beside good ones, and what is said of it
    "missing field": ({"id": "b", "prompt": "x", "response": None}, "the field `response` is"),
    "empty prompt": ({"id": "b", "prompt": "", "response": "r"}, "the field `prompt` is empty"),
    "white space": ({"id": "b", "prompt": "x", "response": " \n\t"}, "the field `response` is empty"),
    "duplicate id": ({"id": "g1", "prompt": "x", "response": "r"}, "the id 'g1' was already used on {first}"),
    "duplicate row": (
        {"id": "b", "prompt": "good 1", "response": "fine"},
        "the same prompt and response as on {first}",
    ),
    "prompt longer than the context": (
        {"id": "b", "prompt": "x" * 90, "response": "r"},
        "the prompt alone has 91 tokens",
    ),
    "response truncated away": (
        {"id": "b", "prompt": "x" * (ROOM - 1), "response": "r"},
        f"no response token fits into `data.max_length` {ROOM}: the prompt alone has {ROOM} tokens",
    ),
    "special token": (
        {"id": "b", "prompt": "x<eos>", "response": "r"},
        "'<eos>', which the tokenizer reads as a control",
    ),
    "huge text": ({"id": "b", "prompt": "x", "response": "r" * 3000}, "has 3000 characters; at most 2000 are read"),
}

LINES = {  # bytes of a line of a jsonl file
    "malformed": (b'{"prompt": "a", ', "not valid JSON"),
    "wrong encoding": (b'{"prompt": "\xff", "response": "r"}', "not UTF-8 (byte 12 of the line)"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "response": "r"}', "not UTF-8 text"),
    "wrong type": (b'{"prompt": ["a"], "response": "r"}', "the field `prompt` is list, not a string"),
    "wrong type of an id": (b'{"id": [1], "prompt": "a", "response": "r"}', "the field `id` is list"),
    "field left out": (b'{"prompt": "a"}', "the field `response` is missing"),
    "no object": (b"[1, 2]", "a list, not an object"),
    "huge number": (b'{"prompt": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "huge line": (b'{"prompt": "' + b"x" * 300_000 + b'"}', "longer than 200000 bytes"),
}

IN_JSON = ("half a surrogate pair", "wrong type", "wrong type of an id", "field left out", "no object")

CSV_LINES = {
    "malformed": (b'b,"x"y,r', "not valid CSV"),
    "wrong encoding": (b"b,x\xff,r", "the field `prompt` is not UTF-8 text (character 1)"),
    "field left out": (b"b,x", "2 fields where the first line names 3"),
    "field too many": (b"b,x,r,s", "4 fields where the first line names 3"),
}

PLACES = {".jsonl": "line {n}", ".json": "record {n}", ".csv": "line {n}", ".parquet": "row {n}", "": "row {n}"}


def write(path, records, types: dict | None = None, answer: str = "response") -> str:
    """Records as a file of the kind that the suffix says; without one, as a folder that `datasets` saved.

    Args:
        path: of the file.
        records: with `id`, `prompt` and `response`.
        types: columns to put in the place of theirs, in a file that has types.
        answer: what the column `response` is called.
    """
    records = [{"id": r.get("id"), "prompt": r.get("prompt"), answer: r.get("response")} for r in records]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", answer])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        write_jsonl(path, records)
    else:
        columns = {name: pyarrow.array([record[name] for record in records]) for name in records[0]}
        table = pyarrow.table(columns | (types or {}))
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(path))
    return str(path)


def not_utf8(count: int) -> pyarrow.Array:
    """Strings, as Arrow takes them for, the last of which is no UTF-8."""
    texts = pyarrow.array([b"good %d" % i for i in range(count - 1)] + [b"\xff"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), count, texts.buffers())


def bad_file(folder, suffix: str, name: str) -> tuple[str, str, int]:
    """A file of eleven good rows and a bad one, what is said of that, and its number."""
    path = folder / f"bad{suffix}"
    number = len(GOOD) + (2 if suffix == ".csv" else 1)
    if name in RECORDS:
        record, message = RECORDS[name]
        path = write(path, [*GOOD, record])
    elif suffix == ".csv":
        line, message = CSV_LINES[name]
        write(path, GOOD)
        path.write_bytes(path.read_bytes() + line + b"\n")
    elif suffix == ".jsonl":
        line, message = LINES[name]
        write(path, GOOD)
        path.write_bytes(path.read_bytes() + line + b"\n")
    elif suffix == ".json":
        line, message = LINES[name]
        path.write_text(json.dumps(GOOD)[:-1] + f", {line.decode()}]")
    else:
        message = "not UTF-8"
        path = write(path, [*GOOD, GOOD[0] | {"id": "b"}], {"prompt": not_utf8(len(GOOD) + 1)})
    return str(path), message, number


CASES = [
    *((suffix, name) for suffix in PLACES for name in RECORDS),
    *((".jsonl", name) for name in LINES),
    *((".json", name) for name in IN_JSON),
    *((".csv", name) for name in CSV_LINES),
    *((suffix, "wrong encoding") for suffix in (".parquet", "")),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "model")


@pytest.fixture
def sets(tmp_path, monkeypatch, tokenizer):
    """Makes a data module with one bad file among clean ones."""
    monkeypatch.setattr(BilevelDataModule, "_load_tokenizer", lambda self: tokenizer)
    monkeypatch.setattr(files, "MAX_LINE", 200_000)
    monkeypatch.setattr(formats, "MAX_TEXT", 2000)

    def make(bad: str, level: str, **settings) -> BilevelDataModule:
        paths = {
            name: write_jsonl(tmp_path / f"{name}.jsonl", [r | {"prompt": f"{name} {i}"} for i, r in enumerate(GOOD)])
            for name in ("pool", "validation", "test")
        }
        return BilevelDataModule(**paths | {level: bad}, max_length=ROOM, cache=str(tmp_path / "cache"), **settings)

    return make


@pytest.mark.parametrize("level", ["pool", "validation", "test"])
@pytest.mark.parametrize(("suffix", "name"), CASES)
def test_a_bad_record_is_named_or_counted(tmp_path, sets, suffix, name, level):
    path, message, number = bad_file(tmp_path, suffix, name)
    place = PLACES[suffix].format(n=number)
    message = message.replace("{first}", f"{path}, {PLACES[suffix].format(n=number - 10)}")
    with pytest.raises(UserError) as caught:
        sets(path, level).setup()
    for part in (f"{path}, {place}", message, "on_bad_row: skip"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    data = sets(path, level, on_bad_row="skip")
    data.setup()
    write_skipped(tmp_path / "run", data.skipped)
    (skipped,) = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert skipped["set"] in ((level, "upper", "monitor") if level == "validation" else (level,))
    assert f"{path}, {place}" in skipped["problem"]
    assert message in skipped["problem"]
    parts = ("upper", "monitor") if level == "validation" else (level,)
    assert sorted(id for part in parts for id in data.sets[part]["id"][:]) == sorted(row["id"] for row in GOOD)


@pytest.mark.parametrize("level", ["pool", "validation", "test"])
@pytest.mark.parametrize("suffix", [".parquet", ""])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"prompt": pyarrow.array([["x"]] * 11)}, "the field `prompt` is list, not a string"),
        ({"response": pyarrow.array([1.5] * 11)}, "the field `response` is float, not a string"),
        ({"id": pyarrow.array([1.5] * 11)}, "the field `id` is float, not a string or a whole number"),
    ],
    ids=["list", "number", "id"],
)
def test_a_column_of_the_wrong_type_is_named_row_by_row(tmp_path, sets, suffix, level, column, message):
    path = write(tmp_path / f"bad{suffix}", GOOD, column)
    with pytest.raises(UserError, match=r"11 problems") as caught:
        sets(path, level).setup()
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"{path}, row {i}: {message}" for i in range(1, 12)
    ]
    with pytest.raises(UserError, match="has no usable record"):
        sets(path, level, on_bad_row="skip").setup()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", [name for name in LINES if name != "field left out"])  # it would be of another format
def test_a_bad_line_is_named_wherever_it_stands(tmp_path, monkeypatch, name, place):
    monkeypatch.setattr(files, "MAX_LINE", 200_000)
    line, message = LINES[name]
    lines = [b'{"prompt": "p", "response": "r"}']
    lines.insert(place, line)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=rf"p\.jsonl, line {place + 1}: .*{re.escape(message)}"):
        Source(str(path)).rows()
    source = Source(str(path), on_bad_row="skip")
    assert [row.prompt for row in source.rows()] == ["p"]
    assert len(source.skipped) == 1


WHOLE = {  # content of a file that cannot be read at all, and what is said of one of text
    "empty": (b"", "is empty"),
    "binary": (b"\x00\x01\x02" * 99, "is a binary file"),
    "compressed": (b"\x1f\x8b" + b"gz" * 9, "is a binary file"),
    "utf-16": ('{"prompt": "p"}'.encode("utf-16"), "is UTF-16"),
    "malformed": (b'[{"prompt": "p",', ""),
    "wrong encoding": (b'[{"prompt": "\xff"}]', ""),
}

ONLY_JSON = {"malformed": "is not valid JSON", "wrong encoding": "is not UTF-8"}  # elsewhere, a matter of one record

NO_FOLDER = "could not be loaded as a folder of data files"

WHOLE_CASES = [
    *((suffix, name, WHOLE[name][1]) for suffix in (".jsonl", ".json", ".csv") for name in WHOLE if WHOLE[name][1]),
    *((".json", name, message) for name, message in ONLY_JSON.items()),
    *((".parquet", name, "is not a readable parquet file") for name in WHOLE if WHOLE[name][1]),
    *(("", name, NO_FOLDER) for name in WHOLE if WHOLE[name][1]),
    *((suffix, "other columns", "fit no known format") for suffix in PLACES),
]


@pytest.mark.parametrize("level", ["pool", "validation", "test"])
@pytest.mark.parametrize(("suffix", "name", "message"), WHOLE_CASES)
def test_files_that_cannot_be_read_are_refused_also_under_skip(tmp_path, sets, suffix, name, message, level):
    path = tmp_path / f"bad{suffix}"
    if name == "other columns":
        write(path, GOOD, answer="r")
    elif suffix:
        path.write_bytes(WHOLE[name][0])
    else:
        path.mkdir()
        for part in ("state.json", "dataset_info.json")[: 0 if name == "empty" else 2]:
            (path / part).write_bytes(WHOLE[name][0])
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=message) as caught:
            sets(str(path), level, on_bad_row=policy).setup()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", PLACES)
@pytest.mark.parametrize("level", ["validation", "test"])
def test_an_overlap_with_the_pool_is_named_or_left_out_of_it(tmp_path, sets, suffix, level):
    path = write(tmp_path / f"bad{suffix}", [*GOOD, {"id": "b", "prompt": " pool 3\n", "response": "r"}])
    place = PLACES[suffix].format(n=len(GOOD) + (2 if suffix == ".csv" else 1))
    message = f"{level} id 'b' has the prompt of pool id 'g3' ({path}, {place}; {tmp_path / 'pool.jsonl'}, line 4)"
    with pytest.raises(UserError) as caught:
        sets(path, level).setup()
    assert message in str(caught.value)
    data = sets(path, level, on_bad_row="skip")
    data.setup()
    assert data.skipped["pool"] == [message]
    assert data.sets["pool"]["id"][:] == [row["id"] for row in GOOD if row["id"] != "g3"]


@pytest.mark.parametrize("suffix", PLACES)
def test_sets_that_are_too_small_are_refused(tmp_path, sets, suffix):
    one = write(tmp_path / f"bad{suffix}", GOOD[:1])
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match="has 1 usable rows, too few to split into an upper and a monitor part"):
            sets(one, "validation", on_bad_row=policy).setup()
        data = sets(one, "pool", on_bad_row=policy, batch_size=2)
        data.setup()
        with pytest.raises(UserError, match=r"the pool has 1 rows and a policy step takes 2.*batch_size"):
            data.train_dataloader()


def test_twenty_problems_are_named_and_the_rest_counted(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD[0], *({"prompt": "", "response": "r"} for _ in range(30))])
    with pytest.raises(UserError, match=r"30 problems(?s:.*)line 21: (?s:.*)and 10 more"):
        Source(path).rows()


def test_rows_longer_than_the_policy_are_refused_before_it_is_loaded(flags, tmp_path, capsys):
    pool = write_jsonl(tmp_path / "pool.jsonl", [*GOOD, {"id": "b", "prompt": "x" * 140, "response": "y" * 9}])
    assert main(["fit", *flags, f"--data.pool={pool}", "--data.truth=null", "--data.max_length=512"]) == 2
    said = capsys.readouterr().err
    assert (
        "the longest row has 151 tokens and the policy was made for 128; set `data.max_length` to at most 128" in said
    )
