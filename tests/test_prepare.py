"""Prepared sets on disk: used again where nothing changed, made anew where anything did, never half."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from support.files import ROOT, TOY, read_jsonl, write_jsonl
from transformers import AutoTokenizer

from lit_bilevel.data import prepare
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.prepare import Preparation
from lit_bilevel.data.rows import Source
from lit_bilevel.data.table import column, write_rows
from lit_bilevel.errors import UserError

COLUMNS = ("row", "id", "prompt", "response", "source", "place", "input_ids", "response_start", "earlier", "digest")


def module(small, cache, **settings) -> BilevelDataModule:
    """A data module that has read its files."""
    data = BilevelDataModule(
        small["pool"], small["validation"], small["test"], tokenizer=str(TOY / "model"), cache=cache, **settings
    )
    data.setup()
    return data


def contents(data: BilevelDataModule) -> dict:
    sets = {name: [table[column][:] for column in COLUMNS] for name, table in data.sets.items()}
    return {"sets": sets, "skipped": data.skipped, "sources": data.source_names}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the sets that were made, in order."""
    names: list[str] = []
    make = Preparation._make

    def note(self, name, source, place):
        names.append(name)
        make(self, name, source, place)

    monkeypatch.setattr(Preparation, "_make", note)
    return names


def test_a_second_run_reads_what_the_first_prepared(small, tmp_path, made):
    first = module(small, str(tmp_path / "cache"))
    assert made == ["pool", "validation", "test"]
    second = module(small, str(tmp_path / "cache"), batch_size=3)
    assert len(made) == 3
    assert contents(second) == contents(first)
    fresh = module(small, False, num_proc=2)
    assert len(made) == 6
    assert contents(fresh) == contents(first)
    assert fresh.fingerprint["sets"] == second.fingerprint["sets"]
    files = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert {name for name in files if not name.endswith(".lock")} == {"about.json", "tokens.arrow"}


def test_without_a_cache_nothing_is_left(small, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = module(small, False)
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("*/tokens.arrow"))
    del data
    assert not folder.exists()


def test_the_key_changes_with_all_that_the_ids_depend_on(tmp_path):
    record = {"prompt": "a", "response": "b"}

    def key(name="p.jsonl", records=(record,), tokenizer=None, columns=None, **settings):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(TOY / "model")
        path = write_jsonl(tmp_path / name, list(records))
        os.utime(path, (0, 0))
        settings = {"max_length": 64} | settings
        return Preparation(Encoder(tokenizer, **settings), tmp_path).key(Source(path, columns=columns or {}))

    chat, extended, cased = (AutoTokenizer.from_pretrained(TOY / "model") for _ in range(3))
    chat.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    extended.add_tokens(["word"])
    cased.eos_token = cased.pad_token
    keys = [
        key(),
        key(records=[record | {"response": "c"}]),  # as long, and as old
        key(name="q.jsonl"),
        key(columns={"x": "prompt"}),
        key(max_length=63),
        key(truncation="left"),
        key(train_on="all"),
        key(tokenizer=chat),
        key(tokenizer=extended),
        key(tokenizer=cased),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_the_key_follows_a_template_that_writes_the_date(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "response": "b"}])
    keys = set()
    for day in ("1 May", "2 May"):
        template = "{{ 'DAY' }}{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.chat_template = template.replace("DAY", day)
        keys.add(Preparation(Encoder(tokenizer, 64), tmp_path).key(Source(path)))
    assert len(keys) == 2


KILLED = """
import os, signal, sys
from lit_bilevel.data import prepare, table
from lit_bilevel.data.module import BilevelDataModule
encode = table._Encode.__call__
def killed(self, columns):
    if columns["row"][0] >= 2000:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, columns)
table._Encode.__call__ = killed
pool, validation, tokenizer, cache = sys.argv[1:]
BilevelDataModule(pool, validation, tokenizer=tokenizer, cache=cache).setup()
"""


def test_a_killed_preparation_is_started_again(small, tmp_path, made):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"add: {i}+1", "response": str(i + 1)} for i in range(3500)])
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, pool, small["validation"], str(TOY / "model"), str(cache)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (partial,) = cache.glob("*.partial")
    assert (partial / "rows.arrow").stat().st_size > 100_000
    assert not list(cache.glob("*/about.json"))
    files = small | {"pool": pool}
    continued = module(files, str(cache))
    assert made == ["pool", "validation", "test"]
    assert not list(cache.glob("*.partial"))
    assert contents(continued) == contents(module(files, False))


def test_a_preparation_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "encode_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        module(small, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_file_that_changes_while_it_is_read_is_refused(small, tmp_path, monkeypatch):
    pool = write_jsonl(tmp_path / "p.jsonl", read_jsonl(Path(small["pool"])))
    encode = prepare.encode_rows

    def change(*arguments):
        Path(pool).write_text(Path(pool).read_text().replace("add", "sub"))
        return encode(*arguments)

    monkeypatch.setattr(prepare, "encode_rows", change)
    with pytest.raises(UserError, match=r"p\.jsonl changed while it was read"):
        module(small | {"pool": pool}, str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("harm", ["shorter", "missing", "nonsense"])
def test_a_prepared_set_that_is_not_whole_is_made_again(small, tmp_path, made, harm):
    expected = contents(module(small, str(tmp_path)))
    for about in tmp_path.glob("*/about.json"):
        tokens = about.with_name("tokens.arrow")
        if harm == "shorter":
            tokens.write_bytes(tokens.read_bytes()[:-100])
        elif harm == "missing":
            tokens.unlink()
        else:
            about.write_text("{")
    assert contents(module(small, str(tmp_path))) == expected
    assert len(made) == 6


def test_runs_that_start_together_prepare_once(small, tmp_path, made):
    def prepare_pool():
        encoder = Encoder(AutoTokenizer.from_pretrained(TOY / "model"), 64)
        lengths.append(len(Preparation(encoder, tmp_path)("pool", Source(small["pool"])).table))

    lengths: list[int] = []
    threads = [threading.Thread(target=prepare_pool) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [90, 90, 90]
    assert made == ["pool"]


def test_bad_rows_are_told_from_the_cache_as_when_they_were_found(small, tmp_path, made):
    records = read_jsonl(Path(small["pool"]))
    bad = [{"prompt": "x"}, records[4] | {"id": "new"}, records[7], {"prompt": "x<eos>", "response": "y"}]
    pool = write_jsonl(tmp_path / "pool.jsonl", [*records, *bad])
    cache, files = str(tmp_path / "cache"), small | {"pool": pool}
    found = [module(files, cache, on_bad_row="skip").skipped["pool"] for _ in range(2)]
    assert made.count("pool") == 1
    assert found[0] == found[1]
    for line, what in zip(range(91, 95), ("missing", "the same prompt", "the id 'r", "control token"), strict=True):
        (message,) = (text for text in found[0] if f"line {line}:" in text or f"line {line}, id" in text)
        assert what in message or what[:6] in message
    errors = []
    for folder in (cache, str(tmp_path / "other")):
        with pytest.raises(UserError, match=r"3 problems(?s:.*)line 91") as caught:
            module(files, folder)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be written.*data\.cache"):
        module(small, str(tmp_path / "file" / "cache"))


def test_the_cache_lies_where_it_is_put(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare.cache_folder(True) == tmp_path / "lit_bilevel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prepare.cache_folder(True) == Path.home() / ".cache" / "lit_bilevel"
    assert prepare.cache_folder("~/x") == Path.home() / "x"
    assert prepare.cache_folder(False) is None


def test_the_cache_is_set_by_a_word_or_a_folder():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BilevelDataModule, "data")
    for given, expected in (("true", True), ("false", False), ("runs/cache", "runs/cache")):
        found = parser.parse_args(["--data.pool=p", "--data.validation=v", f"--data.cache={given}"])
        assert found.data.cache is expected or found.data.cache == expected


def test_reading_takes_a_few_bytes_a_row(tmp_path):
    """A row of these is about 1,000 bytes as Python objects; what is kept of it until the end is 32."""
    peaks = []
    for rows in (3_000, 7_000):
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"prompt": f"{i} " + "word " * 60, "response": "answer " * 40}) + "\n")
        tracemalloc.start()
        table, problems = write_rows(Source(str(path)), tmp_path / f"{rows}.arrow")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (len(table), problems) == (rows, [])
    assert peaks[1] - peaks[0] < 4_000 * 200  # 32, and what sorting them takes


def test_columns_follow_a_selection(small, tmp_path):
    table = module(small, str(tmp_path)).sets["pool"]
    some = table.select([7, 3, 80])
    assert column(some, "row").to_pylist() == [7, 3, 80]
    assert column(table, "length").to_pylist() == [len(ids) for ids in table["input_ids"]]
