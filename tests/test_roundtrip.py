"""Every format in, `lit-bilevel select` out: same schema, untouched fields, and read again as the same rows."""

from __future__ import annotations

import csv
import json
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.files import read_jsonl, write_jsonl
from support.formats import RECORDS, write
from support.sources import Source
from support.weight_files import write_weights

from lit_bilevel.commands.select import main
from lit_bilevel.errors import UserError

WEIGHTS = np.array([1.5, 0.1, 1.4])
EXTRA = {"score": 0.5, "tags": ["a", None], "note": "é\n", "source": "web"}


def pool_of(record: dict, extra: dict) -> list[dict]:
    """Three records that differ in a text, with an id and fields of no format."""
    records = []
    for i, animal in enumerate(("cat", "owl", "fox")):
        text = re.sub("cat|five|4 5", animal, json.dumps(record))
        records.append({"id": f"r{i}", **json.loads(text), **extra})
    return records


def select(tmp_path, pool: str | list[str], output: str, *flags: str) -> int:
    weights = write_weights(tmp_path / "w.parquet", ["r0", "r1", "r2"], WEIGHTS, ["web"] * 3)
    pools = [pool] if isinstance(pool, str) else pool
    return main(
        ["select", "--weights", weights, "--pool", *pools, "--output", str(tmp_path / output), "--top_k=2", *flags]
    )


def turns(path) -> list:
    source = Source(str(path))
    return [(*row.turns, row.response, row.id, row.source) for row in source.rows()], list(source.formats.values())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ""])
@pytest.mark.parametrize("name", RECORDS)
def test_select_keeps_every_format(tmp_path, name, suffix):
    expected, record, _ = RECORDS[name]
    records = pool_of(record, EXTRA)
    pool = write(tmp_path / f"pool{suffix}", records)
    output = "out.parquet" if suffix in (".parquet", "") else "out.jsonl"
    assert select(tmp_path, pool, output) == 0
    if output == "out.jsonl":
        assert read_jsonl(tmp_path / output) == [records[0], records[2]]
    else:
        found = pyarrow.parquet.read_table(tmp_path / output)
        if suffix:
            assert found.equals(pyarrow.parquet.read_table(pool).take([0, 2]), check_metadata=True)
        else:
            whole = datasets.load_from_disk(pool)
            assert found.schema.equals(whole.features.arrow_schema)
            assert found.to_pylist() == [whole[0], whole[2]]
    before, formats = turns(pool)
    assert turns(tmp_path / output) == ([before[0], before[2]], [expected])
    assert formats == [expected]


@pytest.mark.parametrize("name", ["prompt_response", "alpaca_input", "preference", "text"])
def test_a_csv_pool_stays_csv(tmp_path, name):
    records = pool_of(RECORDS[name][1], {"note": 'é "quoted",\nsecond line', "score": "0.5"})
    pool = write(tmp_path / "pool.csv", records)
    for output in ("out.csv", "out.jsonl", "out.parquet"):
        assert select(tmp_path, pool, output) == 0
        assert turns(tmp_path / output)[0] == [turns(pool)[0][i] for i in (0, 2)]
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [records[0], records[2]]
    assert read_jsonl(tmp_path / "out.jsonl") == [records[0], records[2]]


def test_csv_holds_no_lists(tmp_path, capsys):
    pool = write_jsonl(tmp_path / "pool.jsonl", pool_of(RECORDS["messages"][1], {}))
    assert select(tmp_path, pool, "out.csv") == 2
    assert "the field 'messages' holds a list, which csv lacks" in capsys.readouterr().err


def test_several_pools_are_one(tmp_path):
    records = pool_of(RECORDS["prompt_response"][1], {})
    lines = write_jsonl(tmp_path / "a.jsonl", records[:1])
    tables = [write(tmp_path / f"{n}.parquet", records[i : i + 1]) for i, n in ((1, "b"), (2, "c"))]
    assert select(tmp_path, [lines, *tables], "out.jsonl") == 0
    assert read_jsonl(tmp_path / "out.jsonl") == [records[0], records[2]]
    nameless = [{k: v for k, v in record.items() if k != "id"} for record in records]
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [record]) for i, record in enumerate(nameless)]
    weights = write_weights(tmp_path / "n.parquet", ["0", "1", "2"], WEIGHTS, ["0", "1", "2"])
    flags = ["--weights", weights, "--pool", *paths, "--output", str(tmp_path / "n.jsonl"), "--top_k=2"]
    assert main(["select", *flags]) == 0
    assert read_jsonl(tmp_path / "n.jsonl") == [nameless[0], nameless[2]]


# ---- names of datasets: `name`, `name:config`, `name:config:split`, offline on folders ----


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder as the hub stores a dataset: two configurations, two splits."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "set"
    folder.mkdir()
    parts = []
    for config in ("easy", "hard"):
        files = []
        for split in ("train", "test"):
            records = [
                {"id": f"{config}-{split}-{i}", "instruction": f"{config} {i}", "output": split} for i in range(3)
            ]
            write_jsonl(folder / f"{config}-{split}.jsonl", records)
            files.append(f"  - split: {split}\n    path: {config}-{split}.jsonl\n")
        default = "  default: true\n" if config == "easy" else ""
        parts.append(f"- config_name: {config}\n{default}  data_files:\n{''.join(files)}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(parts) + "---\n")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "easy-train"),
        (":hard", "hard-train"),
        (":hard:test", "hard-test"),
        ("::test", "easy-test"),
        ("::train[1:]", "easy-train"),
    ],
)
def test_configurations_and_splits_are_chosen_by_name(repository, tmp_path, name, expected):
    source = Source(repository + name)
    rows = source.rows()
    first = 1 if "[" in name else 0
    assert [row.id for row in rows] == [f"{expected}-{i}" for i in range(first, 3)]
    assert list(source.formats.values()) == ["alpaca"]
    weights = write_weights(
        tmp_path / "w.parquet", [row.id for row in rows], np.arange(len(rows)) + 1.0, [""] * len(rows)
    )
    flags = ["--weights", weights, "--pool", repository + name, "--top_k=1", "--output", str(tmp_path / "o.jsonl")]
    assert main(["select", *flags]) == 0
    assert [record["id"] for record in read_jsonl(tmp_path / "o.jsonl")] == [f"{expected}-2"]


@pytest.mark.parametrize("name", [":none", ":easy:none"])
def test_names_that_do_not_exist_are_refused(repository, name):
    with pytest.raises(UserError, match=r"could not be loaded.*name:config:split"):
        Source(repository + name).rows()
