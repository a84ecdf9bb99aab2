"""One record of every format of data, and files of them."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet

from lit_bilevel.types import Row
from support.files import write_jsonl
from support.sources import Source

SHORT = [("user", "What is a cat?"), ("assistant", "A small animal.")]
LONG = [("system", "Be brief."), *SHORT, ("user", "And a dog?"), ("assistant", "Another.")]


def as_messages(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


GPT = {"user": "human", "assistant": "gpt", "system": "system"}
RECORDS = {  # name: (format that is detected, record, turns)
    "prompt_response": ("prompt_response", {"prompt": "What is a cat?", "response": "A small animal."}, SHORT),
    "completion": ("prompt_response", {"prompt": "What is a cat?", "completion": "A small animal."}, SHORT),
    "trl_chat": ("prompt_response", {"prompt": as_messages(LONG[:-1]), "completion": as_messages(LONG[-1:])}, LONG),
    "alpaca": ("alpaca", {"instruction": "What is a cat?", "input": "", "output": "A small animal."}, SHORT),
    "alpaca_input": (
        "alpaca",
        {"instruction": "Add.", "input": "4 5", "output": "9", "text": "all of it"},
        [("user", "Add.\n4 5"), ("assistant", "9")],
    ),
    "alpaca_history": (
        "alpaca",
        {
            "system": "Be brief.",
            "history": [["What is a cat?", "A small animal."]],
            "instruction": "And a dog?",
            "output": "Another.",
        },
        LONG,
    ),
    "messages": ("messages", {"messages": as_messages(LONG)}, LONG),
    "sharegpt": ("sharegpt", {"conversations": [{"from": GPT[r], "value": t} for r, t in LONG]}, LONG),
    "sharegpt_system": (
        "sharegpt",
        {"system": "Be brief.", "conversations": [{"from": GPT[r], "value": t} for r, t in LONG[1:]]},
        LONG,
    ),
    "preference": ("preference", {"prompt": "What is a cat?", "chosen": SHORT[1][1], "rejected": "A dog."}, SHORT),
    "preference_chat": (
        "preference",
        {"chosen": as_messages(LONG), "rejected": as_messages([*LONG[:-1], ("assistant", "A wolf.")])},
        LONG,
    ),
    "text": ("text", {"text": "four and five are nine"}, [("assistant", "four and five are nine")]),
}


def write(path, records):
    """Records in the format that the suffix names."""
    if path.suffix == ".jsonl":
        write_jsonl(path, records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return str(path)


def read(tmp_path, record, **settings) -> Row:
    source = Source(write_jsonl(tmp_path / "p.jsonl", [record]), **settings)
    return source.rows()[0]
