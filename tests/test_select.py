"""`lit-bilevel select`: every mode over 100,000 rows, rows copied unchanged, refusals of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from support.files import ROOT, read_jsonl, write_jsonl
from support.weight_files import write_weights

from lit_bilevel.commands.select import apportion, main

ROWS = 100_000
SOURCES = ["books", "chat", "web"]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict:
    """A pool of 100,000 rows in no order of weight, with its weights in another order."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    weights = random.gamma(0.5, 2.0, ROWS)
    weights *= ROWS / weights.sum()
    number = random.choice(3, ROWS, p=[0.1, 0.2, 0.7])
    ids = [f"r-{i:06d}" for i in random.permutation(ROWS)]
    lines = [
        json.dumps({"id": key, "prompt": f"Frage {i} ä\n", "response": "ja", "source": SOURCES[n], "x": [i, None]})
        for i, (key, n) in enumerate(zip(ids, number, strict=True))
    ]
    pool = folder / "pool.jsonl"
    pool.write_text("\n".join(lines) + "\n", encoding="utf-8")
    order = random.permutation(ROWS)
    sources = [SOURCES[number[i]] for i in order]
    path = write_weights(folder / "weights.parquet", [ids[i] for i in order], weights[order], sources)
    place = {line: i for i, line in enumerate(lines)}
    return {"pool": str(pool), "weights": path, "ids": ids, "place": place, "weight": weights, "number": number}


def select(data: dict, output: Path, *flags: str) -> int:
    return main(["select", "--weights", data["weights"], "--pool", data["pool"], "--output", str(output), *flags])


def kept(data: dict, output: Path) -> np.ndarray:
    """Positions of the kept rows; checks that they are the source's own lines, in its order."""
    positions = np.array([data["place"][line] for line in output.read_text(encoding="utf-8").splitlines()])
    assert (np.diff(positions) > 0).all()
    return positions


@pytest.mark.parametrize(("flags", "count"), [(["--keep", "0.8"], 80_000), (["--top_k", "1234"], 1234)])
def test_the_highest_weights_are_kept(large, tmp_path, flags, count, capsys):
    output = tmp_path / "new" / "out.jsonl"
    assert select(large, output, *flags) == 0
    found = kept(large, output)
    assert len(found) == count
    assert large["weight"][found].min() >= np.delete(large["weight"], found).max(initial=0)
    printed = capsys.readouterr().out
    for number, name in enumerate(SOURCES):
        assert any(
            line.split()[:2] == [name, f"{(large['number'][found] == number).sum():,}"] for line in printed.splitlines()
        )
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_a_threshold_keeps_all_that_reach_it(large, tmp_path):
    select(large, tmp_path / "out.jsonl", "--threshold", "1.5")
    assert kept(large, tmp_path / "out.jsonl").tolist() == (large["weight"] >= 1.5).nonzero()[0].tolist()


def test_sampling_follows_the_weights_and_the_seed(large, tmp_path):
    found = []
    for name, seed in (("a", "1"), ("b", "2"), ("c", "2")):
        assert select(large, tmp_path / f"{name}.jsonl", "--sample", "5000", "--seed", seed) == 0
        found.append(kept(large, tmp_path / f"{name}.jsonl"))
    assert len(set(found[0])) == 5000
    assert np.array_equal(found[1], found[2])
    assert not np.array_equal(found[0], found[1])
    # few of many: a row's chance is nearly proportional to its weight, so the kept mean is nearly E[w²]/E[w]
    mean = np.concatenate([large["weight"][found[0]], large["weight"][found[2]]]).mean()
    assert mean == pytest.approx((large["weight"] ** 2).mean(), rel=0.15)


def test_sampling_without_replacement_has_the_right_chances(tmp_path):
    weights = np.array([4.0, 2.0, 1.0, 0.0])
    data = {"weights": write_weights(tmp_path / "w.parquet", list("abcd"), weights, [""] * 4)}
    data["pool"] = write_jsonl(tmp_path / "pool.jsonl", [{"id": key} for key in "abcd"])
    counts = dict.fromkeys("abcd", 0)
    for seed in range(200):
        select(data, tmp_path / "out.jsonl", "--sample", "1", "--seed", str(seed))
        counts[read_jsonl(tmp_path / "out.jsonl")[0]["id"]] += 1
    assert counts["d"] == 0
    for key, weight in zip("abc", weights, strict=False):
        assert counts[key] == pytest.approx(200 * weight / 7, abs=32)
    assert select(data, tmp_path / "out.jsonl", "--sample", "4") == 2


@pytest.mark.parametrize("mode", [["--keep", "0.3"], ["--sample", "30000"]])
def test_balance_keeps_the_same_share_of_every_source(large, tmp_path, mode):
    select(large, tmp_path / "out.jsonl", *mode, "--balance")
    found = kept(large, tmp_path / "out.jsonl")
    assert len(found) == 30_000
    for number in range(3):
        own = large["number"] == number
        assert own[found].sum() == pytest.approx(0.3 * own.sum(), abs=1)
        if mode[0] == "--keep":
            weights = np.sort(large["weight"][own])[::-1]
            assert large["weight"][found][own[found]].min() == weights[own[found].sum() - 1]


def test_balance_equal_takes_as_many_of_each(large, tmp_path):
    select(large, tmp_path / "out.jsonl", "--top_k", "30000", "--balance", "equal")
    counts = np.bincount(large["number"][kept(large, tmp_path / "out.jsonl")])
    books = (large["number"] == 0).sum()
    assert counts.sum() == 30_000
    assert counts[0] == min(books, 10_000)
    assert abs(counts[1] - counts[2]) <= 1


def test_balance_with_a_threshold_is_relative_to_the_source(large, tmp_path):
    select(large, tmp_path / "out.jsonl", "--threshold", "2", "--balance")
    mean = np.array([large["weight"][large["number"] == n].mean() for n in range(3)])
    expected = large["weight"] >= 2 * mean[large["number"]]
    assert kept(large, tmp_path / "out.jsonl").tolist() == expected.nonzero()[0].tolist()


def test_apportioning():
    many = np.array([100, 100, 100])
    assert apportion(10, [1, 1, 1], many).tolist() == [4, 3, 3]
    assert apportion(10, [1, 2, 7], many).tolist() == [1, 2, 7]
    assert apportion(10, [1, 1, 1], np.array([1, 2, 50])).tolist() == [1, 2, 7]
    assert apportion(7, [5, 0, 0], np.array([9, 0, 0])).tolist() == [7, 0, 0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_result_loads_as_a_plain_dataset(large, tmp_path, suffix):
    output = tmp_path / f"out.{suffix}"
    select(large, output, "--keep", "0.2", "--with_weights")
    kind = "json" if suffix == "jsonl" else suffix
    loaded = load_dataset(kind, data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["id", "prompt", "response", "source", "x", "weight"]
    place = {key: i for i, key in enumerate(large["ids"])}
    positions = [place[key] for key in loaded["id"]]
    assert np.allclose(loaded["weight"], large["weight"][positions], rtol=0, atol=0)
    assert loaded[0]["x"] == [positions[0], None]


def test_a_parquet_pool_keeps_its_schema(tmp_path):
    values = {
        "key": pyarrow.array([7, 8, 9], pyarrow.int16()),
        "prompt": pyarrow.array(["a", "b", None], pyarrow.large_string()),
        "when": pyarrow.array([0, 1, 2], pyarrow.timestamp("ms")),
        "raw": pyarrow.array([b"x", b"y", b"z"]),
    }
    table = pyarrow.table(values).replace_schema_metadata({"owner": "me"})
    pyarrow.parquet.write_table(table, tmp_path / "pool.parquet")
    weights = write_weights(tmp_path / "w.parquet", ["7", "8", "9"], np.array([1.5, 0.1, 1.4]), [""] * 3)
    data = {"pool": str(tmp_path / "pool.parquet"), "weights": weights}
    assert select(data, tmp_path / "out.parquet", "--top_k", "2", "--id_column", "key") == 0
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.equals(table.take([0, 2]), check_metadata=True)
    assert select(data, tmp_path / "out.jsonl", "--top_k", "1", "--id_column", "key") == 0
    assert read_jsonl(tmp_path / "out.jsonl") == [
        {"key": 7, "prompt": "a", "when": "1970-01-01T00:00:00", "raw": "eA=="}
    ]


def test_a_dataset_written_by_datasets_takes_the_weight_column(tmp_path):
    Dataset.from_dict({"id": ["a", "b"], "prompt": ["x", "y"]}).to_parquet(tmp_path / "pool.parquet")
    weights = write_weights(tmp_path / "w.parquet", ["a", "b"], np.array([0.5, 1.5]), [""] * 2)
    data = {"pool": str(tmp_path / "pool.parquet"), "weights": weights}
    assert select(data, tmp_path / "out.parquet", "--top_k", "1", "--with_weights") == 0
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0] == {"id": "b", "prompt": "y", "weight": 1.5}


def test_without_ids_the_row_number_joins_and_blank_lines_do_not_count(tmp_path):
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"prompt": "a"}\n\n  {"prompt":  "b"}\r\nnot json\n{"prompt": "d"}', encoding="utf-8")
    weights = write_weights(tmp_path / "w.parquet", ["0", "1", "3"], np.array([0.1, 1.9, 1.0]), [""] * 3)
    data = {"pool": str(pool), "weights": weights}
    assert select(data, tmp_path / "out.jsonl", "--top_k", "2") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"prompt":  "b"}\n{"prompt": "d"}\n'


def test_equal_weights_do_not_favour_the_start_of_the_file(tmp_path):
    ids = [str(i) for i in range(1000)]
    data = {"weights": write_weights(tmp_path / "w.parquet", ids, np.ones(1000), [""] * 1000)}
    data["pool"] = write_jsonl(tmp_path / "pool.json", [])
    Path(data["pool"]).write_text(json.dumps([{"id": int(key), "text": "é\ud800"} for key in ids]))
    select(data, tmp_path / "out.jsonl", "--keep", "0.5")
    found = [record["id"] for record in read_jsonl(tmp_path / "out.jsonl")]
    assert len(found) == 500
    assert 450 < np.mean(found) < 550
    assert found == sorted(found)


def refused(capsys, flags: list[str]) -> str:
    assert main(["select", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lit-bilevel select: ")
    assert message.count("\n") == 1
    return message


def test_mistakes_are_answered_in_one_line(large, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"id": key} for key in large["ids"][:3]])
    base = ["--weights", large["weights"], "--pool", pool, "--output", str(output)]
    assert "one of the arguments --keep --top_k --threshold --sample is required" in refused(capsys, base)
    assert "not allowed with" in refused(capsys, [*base, "--keep", "0.5", "--top_k", "3"])
    assert "`--keep` is 80" in refused(capsys, [*base, "--keep", "80"])
    assert "4 rows are wanted and there are 3 rows with a weight" in refused(capsys, [*base, "--top_k", "4"])
    assert "no row is left" in refused(capsys, [*base, "--threshold", "1e9"])
    assert "must end in .jsonl, .csv or .parquet" in refused(capsys, [*base, "--keep", "1", "--output", "out.txt"])
    assert "file of `--pool`" in refused(capsys, [*base, "--keep", "1", "--output", pool])
    assert "does not exist" in refused(capsys, [*base, "--keep", "1", "--pool", "nowhere.jsonl"])
    assert "does not exist" in refused(capsys, [*base, "--keep", "1", "--weights", "nowhere.parquet"])
    assert "not a table with" in refused(capsys, [*base, "--keep", "1", "--weights", pool])
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "else", "weight": 1}])
    assert "no row of" in refused(capsys, [*base, "--keep", "1", "--pool", other])
    nameless = write_jsonl(tmp_path / "nameless.jsonl", [{"prompt": "a"}])
    assert "go up to row 99999" in refused(capsys, [*base, "--keep", "1", "--pool", nameless])
    assert not list(tmp_path.glob("out*"))


def test_an_existing_weight_column_is_not_overwritten(tmp_path, capsys):
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"id": "a", "weight": 3}])
    weights = write_weights(tmp_path / "w.parquet", ["a"], np.ones(1), [""])
    flags = ["--weights", weights, "--pool", pool, "--keep", "1", "--output", str(tmp_path / "out.jsonl")]
    assert "set `--weight_column`" in refused(capsys, [*flags, "--with_weights"])
    assert main(["select", *flags, "--with_weights", "--weight_column", "w"]) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == [{"id": "a", "weight": 3, "w": 1.0}]


def test_nothing_heavy_is_imported():
    code = (
        "import sys, lit_bilevel.commands.select; sys.exit(any(name in sys.modules for name in ('torch', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- scores in the place of weights ----


@pytest.fixture
def scored(tmp_path) -> list[str]:
    """Flags for a pool of ten rows whose scores have another order, and a row without `ifd`."""
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"id": f"r{i}", "prompt": "a", "response": "b"}) + "\n" for i in range(10)))
    number = np.arange(10, dtype=np.float32)
    columns = {
        "id": [f"r{i}" for i in range(9, -1, -1)],
        "ifd": number[::-1] / 10,
        "pmi": number,
        "density_ratio": number,
    }
    columns["end_loss"] = np.where(number == 3, np.nan, number)
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "scores.parquet")
    return ["--pool", str(pool), "--weights", str(tmp_path / "scores.parquet"), "--output", str(tmp_path / "out.jsonl")]


@pytest.mark.parametrize(
    ("by", "mode", "kept"),
    [
        ("ifd", ["--keep", "0.3"], [0, 1, 2]),  # r_i has ifd i/10, and low values speak for a row
        ("pmi", ["--keep", "0.3"], [0, 1, 2]),  # r_i has pmi 9 − i
        ("ifd", ["--threshold", "0.35"], [0, 1, 2, 3]),
        ("pmi", ["--threshold", "8"], [0, 1]),
        ("density_ratio", ["--sample", "9"], list(range(9))),  # r9 has a ratio of 0
    ],
)
def test_rows_are_kept_by_a_score_in_the_direction_that_speaks_for_them(scored, tmp_path, by, mode, kept):
    assert main(["select", *scored, "--by", by, *mode, "--with_weights", "--weight_column", "score"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [f"r{i}" for i in kept]
    if by == "ifd":
        assert [row["score"] for row in found] == pytest.approx([i / 10 for i in kept])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "0.5"], "no column `weight`; `--by` can be: ifd, pmi, density_ratio, end_loss"),
        (["--keep", "0.5", "--by", "end_loss"], "has no `end_loss` for 1 of 10 rows"),
        (["--sample", "3", "--by", "ifd"], "`ifd` is none"),
        (["--keep", "0.5", "--by", "ifd", "--balance"], "does not have"),
        (["--threshold", "-1", "--by", "ifd"], "the lowest ifd is 0"),
    ],
)
def test_scores_that_cannot_choose_are_refused(scored, flags, message, capsys):
    assert message in refused(capsys, [*scored, *flags])
