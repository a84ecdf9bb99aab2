"""Files of scores: the plan of parts, parts kept for their key, the table, weights from it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lit_bilevel.scores import parts
from lit_bilevel.scores.columns import COLUMNS, DIRECTION
from lit_bilevel.scores.measure import compress
from lit_bilevel.scores.parts import PartFiles, plan
from lit_bilevel.scores.table import read_scores, weights_from_score, write_scores


def test_a_plan_has_every_row_once_in_parts_of_like_length():
    lengths = {"pool": np.random.default_rng(0).integers(3, 90, 1000), "upper": np.arange(50)}
    found = plan(lengths)
    for name, length in lengths.items():
        own = [part for part in found if part.set == name]
        assert sorted(np.concatenate([part.rows for part in own]).tolist()) == list(range(len(length)))
        spans = [(length[part.rows].max(), length[part.rows].min()) for part in own]
        assert all(a[1] >= b[0] for a, b in itertools.pairwise(spans))
    assert [part.number for part in found] == list(range(len(found)))
    assert max(len(part.rows) for part in plan({"pool": np.ones(10**6)})) <= parts.MOST


def test_parts_are_kept_for_their_key_alone(tmp_path):
    folder = tmp_path / "out.parquet.parts"
    part = plan({"pool": np.arange(5)})[0]
    files = PartFiles(folder, {"rows": "a"})
    assert files.open() == 0
    files.write(part, np.arange(10, dtype=np.float32).reshape(5, 2))
    (folder / "00007.partial").write_bytes(b"half")
    assert PartFiles(folder, {"rows": "a"}).open() == 1
    assert not (folder / "00007.partial").exists()
    assert files.read([part], {"pool": 5})["pool"][part.rows[0]].tolist() == [0, 1]
    assert PartFiles(folder, {"rows": "b"}).open() == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="move it away"):
        PartFiles(tmp_path / "mine", {}).open()
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_file_of_scores_comes_back(tmp_path):
    columns = {"loss": np.array([1, 2], np.float32), "ifd": np.array([0.5, 2], np.float32)}
    write_scores(tmp_path / "s.parquet", ["a", "b"], columns, {"policy": "x"})
    found = read_scores(tmp_path / "s.parquet")
    assert found.ids == ["a", "b"]
    assert found.orient("ifd").tolist() == [-0.5, -2]
    with pytest.raises(ValueError, match="no score 'pmi'; there are: loss, ifd"):
        found.orient("pmi")
    with pytest.raises(ValueError, match="does not exist"):
        read_scores(tmp_path / "none.parquet")
    assert set(DIRECTION) == {*COLUMNS, "weight"}


def test_weights_from_scores_have_mean_1_and_keep_the_order():
    score = np.random.default_rng(0).normal(3, 2, 200)
    weights = weights_from_score("ifd", score)
    assert weights.mean() == pytest.approx(1)
    assert (weights.argsort() == score.argsort()).all()
    z = (score - score.mean()) / score.std()
    np.testing.assert_allclose(weights / weights[0], (1 + np.exp(-z[0])) / (1 + np.exp(-z)))
    ratio = np.abs(score)
    np.testing.assert_allclose(weights_from_score("density_ratio", ratio), ratio / ratio.mean())


def test_compressed_tells_repetition():
    assert compress("na " * 40) < 0.2 < compress("Paris is the capital of France.") < 1.5
