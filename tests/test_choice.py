"""What a small monitor part can tell of a choice."""

import math

import numpy as np
import pytest
import torch

from lit_bilevel.comparison.choice import in_words, rivals
from lit_bilevel.comparison.significance import standard_error
from lit_bilevel.training.evaluation import StandardError


def test_the_standard_error_is_that_of_numpy_in_any_batches():
    loss_n = torch.rand(37) * 1e-3 + 5.0  # losses that hardly differ
    metric = StandardError()
    for part in loss_n.split(8):
        filled = torch.cat([part, torch.full((3,), 99.0)])  # rows that only fill a shape
        metric.update(filled, torch.tensor([1.0] * len(part) + [0.0] * 3))
    assert metric.compute().item() == pytest.approx(standard_error(loss_n.double().numpy()), rel=1e-6)
    assert metric.to(torch.bfloat16).total.dtype == torch.float64
    single = StandardError()
    single.update(torch.ones(1), torch.ones(1))
    assert math.isnan(single.compute())
    assert math.isnan(standard_error(np.ones(1)))


def test_rivals_are_compared_row_by_row():
    random = np.random.default_rng(0)
    row_n = random.normal(2, 1, 400)  # some rows are harder than others, for every method
    losses = {
        "far": {0: row_n + 0.1 + random.normal(0, 0.05, 400)},
        "best": {0: row_n, 1: row_n},
        "near": {0: row_n + np.resize([0.0502, -0.0498], 400)},
    }
    best, others = rivals(losses)
    assert best == "best"
    assert [rival.method for rival in others] == ["near", "far"]
    near, far = others
    assert far.is_clear
    assert not near.is_clear
    assert far.error == pytest.approx(0.05 / 20, rel=0.2)  # of the pairs: that of the losses is 20 times as large
    text = in_words(losses)
    assert "cannot tell it from near (+" in text
    assert "far" not in text
    assert "tells best from the others: the nearest, far" in in_words(losses, ["best", "far"])
    assert in_words(losses, ["best"]) == "" == in_words({})


def test_the_rows_needed_make_the_difference_clear():
    random = np.random.default_rng(1)
    apart = random.normal(0.02, 0.1, 20_000)

    def found(rows: int):
        return rivals({"a": {0: np.zeros(rows)}, "b": {0: apart[:rows]}})[1][0]

    few = found(60)
    assert not few.is_clear
    assert few.difference > 0
    assert found(math.ceil(4 * few.rows_needed)).is_clear
