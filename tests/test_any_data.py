"""Whole data sets of any shape: what is learned is what the tokenizer alone renders."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.files import write_jsonl
from support.sources import Source
from support.templates import SAME, learned, reference, tokenizer_with

from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.table import encode_rows, write_rows

WORDS = st.text(st.sampled_from("ab 7?.,'\n\t\"ä€漢😀{}[]|\\"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "[assistant]" not in text
)
FLAG = st.sampled_from([{}, {}, {}, {"weight": 1}, {"train": True}, {"weight": 0}, {"train": False}])
METADATA = st.sampled_from([{}, {"lang": "en"}, {"score": 3}, {"tags": ["x"]}])
DAMAGE = {
    "answer missing": lambda record: {k: v for k, v in record.items() if k not in ("response", "output")},
    "answer empty": lambda record: {k: "" if k in ("response", "output") else v for k, v in record.items()},
    "answer a number": lambda record: {k: 5 if k in ("response", "output") else v for k, v in record.items()},
    "turns empty": lambda record: {k: [] if k in ("messages", "conversations") else v for k, v in record.items()},
    "turns text": lambda record: {k: "x" if k in ("messages", "conversations") else v for k, v in record.items()},
    "picture": lambda record: record | {"images": ["a.png"]},
    "bad answer": lambda record: record | {"label": False},
    "control token": lambda record: json.loads(json.dumps(record).replace('": "', '": "<eos>')),
}


@st.composite
def conversations(draw) -> list[dict]:
    """Turns from the user's, or the assistant's, to an answer, with flags."""
    first = draw(st.sampled_from(["user", "user", "assistant"]))
    system = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    rounds = draw(st.integers(1, 3))
    made = [{"role": "assistant", "content": draw(WORDS)} | draw(FLAG)] if first == "assistant" else []
    for _ in range(rounds):
        made += [{"role": "user", "content": draw(WORDS)}, {"role": "assistant", "content": draw(WORDS)} | draw(FLAG)]
    return system + made


@st.composite
def records(draw, format: str) -> tuple[dict, list[dict]]:
    """A record and its turns."""
    talk = draw(conversations())
    if format in ("prompt_response", "alpaca", "completion"):
        question, answer = draw(WORDS), draw(WORDS)
        names = {"prompt_response": ("prompt", "response"), "completion": ("prompt", "completion")}
        one, other = names.get(format, ("instruction", "output"))
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        record: dict[str, Any] = {one: question, other: answer}
        if format == "alpaca" and draw(st.booleans()):
            record["input"] = draw(WORDS)
            talk[0]["content"] = f"{question}\n{record['input']}"
    elif format == "messages":
        record = {"messages": talk}
    elif format == "split":
        record = {"prompt": talk[:-1], "completion": talk[-1:]}
    else:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [m | {"from": names[m["role"]], "value": m["content"]} for m in talk]
        record = {"conversations": [{k: v for k, v in m.items() if k not in ("role", "content")} for m in turns]}
    return record | draw(METADATA), talk


@st.composite
def sets(draw) -> dict[str, Any]:
    """A format, a kind of file, a template, rows with their turns, and damage to some of them."""
    format = draw(st.sampled_from(["prompt_response", "completion", "alpaca", "messages", "split", "sharegpt"]))
    flat = format in ("prompt_response", "completion", "alpaca")
    rows = draw(st.lists(records(format), min_size=1, max_size=4, unique_by=lambda pair: json.dumps(pair[1])))
    damage = [draw(st.sampled_from([None, None, None, *DAMAGE])) for _ in rows]
    return {
        "rows": rows,
        "damage": damage,
        "suffix": draw(st.sampled_from([".jsonl", ".json", *([".csv"] if flat else []), ".parquet", "folder"])),
        "template": draw(st.sampled_from([None, *SAME])),
        "train_on": draw(st.sampled_from(["last", "all"])),
    }


def write(folder: Path, suffix: str, rows: list[dict]) -> str:
    path = folder / f"p{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, rows)
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).to_parquet(path)
    else:
        path = folder / "train[1]"
        path.mkdir()
        for number, row in enumerate(rows):
            write_jsonl(path / f"{number}_test.jsonl", [row])
    return str(path)


def check(case: dict[str, Any]) -> None:
    """Every good row is encoded as the reference says; every damaged one is refused."""
    tokenizer = tokenizer_with(SAME.get(case["template"]))
    rows = [record | {"id": f"r{i}"} for i, (record, _) in enumerate(case["rows"])]
    # a file with one type a column cannot hold all damage
    typed = case["suffix"] in (".parquet", ".csv")
    damage = [None if typed and name not in (None, "control token") else name for name in case["damage"]]
    if case["suffix"] == "folder":  # of a file a row, which without its answer is of no known format
        damage = [None if name == "answer missing" else name for name in damage]
    damaged = {i for i, name in enumerate(damage) if name and DAMAGE[name](rows[i]) != rows[i]}
    files = [DAMAGE[damage[i]](row) if i in damaged else row for i, row in enumerate(rows)]
    if all("response" not in f and "output" not in f and "completion" not in f and "messages" not in f
           and "conversations" not in f for f in files):  # fmt: skip
        return  # of no known format
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Source(write(folder, case["suffix"], files))
        table, problems = write_rows(source, folder / "rows.arrow")
        encoder = Encoder(tokenizer, 10_000, train_on=case["train_on"])
        found = {}
        if len(table):
            for made in encode_rows(table, encoder, folder / "tokens.arrow"):
                found[made["id"]] = made
        for i, (_, talk) in enumerate(case["rows"]):
            answers = [n for n, m in enumerate(talk) if m["role"] == "assistant"]
            own = [n for n in answers if talk[n].get("weight", 1) and talk[n].get("train", True)]
            wanted = own if case["train_on"] == "all" else [n for n in answers[-1:] if n in own]
            made = found.get(f"r{i}")
            refused = made is None or made["problem"] is not None
            assert refused == (i in damaged or not wanted), (problems, made)
            if refused:
                continue
            messages = [{"role": m["role"], "content": m["content"]} for m in talk]
            text, parts = reference(tokenizer, messages[: wanted[-1] + 1], wanted)
            assert tokenizer.decode(made["input_ids"]) == text
            starts = [*made["earlier"], *range(made["response_start"], len(made["input_ids"]))]
            runs = learned(tokenizer, type("Made", (), made))
            if case["template"] is None and wanted[0] == 0:  # nothing predicts the first token
                first = tokenizer(parts[0], add_special_tokens=False).input_ids
                parts = [tokenizer.decode(first[1:]), *parts[1:]]
            assert runs == parts
            assert made["notice"] is None
            assert len(set(starts)) == len(starts)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=25, **COMMON)
@given(sets())
def test_what_is_learned_is_what_the_tokenizer_renders(case):
    check(case)


@pytest.mark.slow
@settings(max_examples=2000, **COMMON)
@given(sets())
def test_what_is_learned_is_what_the_tokenizer_renders_of_two_thousand_sets(case):
    check(case)
