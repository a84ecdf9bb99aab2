"""Statistics of the weights against numpy, and what an epoch of a large pool costs to sum up."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from support.files import read_jsonl

from lit_bilevel import LitBilevel, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.callbacks import WeightInspector
from lit_bilevel.inspection.curves import thin
from lit_bilevel.inspection.statistics import correlation, precision_recall, quantile, quantiles, ranks, source_mass


def test_statistics_against_numpy():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    assert ranks(values).tolist() == [2.5, 0.0, 2.5, 1.0]
    random = torch.rand(1000, dtype=torch.float64)
    assert correlation(ranks(random), ranks(random**3)) == pytest.approx(1)
    assert correlation(ranks(random), ranks(-random)) == pytest.approx(-1)
    assert correlation(ranks(random), ranks(torch.ones(1000))) is None
    expected = np.quantile(random.numpy(), 0.25, method="nearest")
    assert quantiles(random)["25"] == pytest.approx(expected, abs=2e-3)
    assert quantile(random, 0.99) == pytest.approx(np.quantile(random.numpy(), 0.99, method="nearest"), abs=2e-3)
    corrupted = torch.rand(1000) < 0.3 + 0.4 * (random < 0.5)
    curve = precision_recall(random, corrupted, points=1000)
    for threshold in (0.2, 0.7):
        low = random <= threshold
        hits = (low & corrupted).sum().item()
        pair = pytest.approx((hits / corrupted.sum().item(), hits / low.sum().item()))
        assert curve[low.sum() - 1] == pair
    assert precision_recall(torch.ones(4), torch.tensor([True, False, False, False])) == [(1.0, 0.25)]
    assert precision_recall(torch.ones(2), torch.tensor([False, False])) == []
    mass = source_mass(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0, 1, 1]), ["a", ""])
    assert mass == {"(none)": 1.0, "a": pytest.approx(1 / 3)}
    assert thin([(i, float(i)) for i in range(1000)], 10)[0] == (99, 49.5)


def test_an_epoch_of_a_hundred_thousand_rows_is_summed_up_in_a_second(tmp_path):
    """At 1,000 rows a second, fast for a language model, such an epoch trains for 100 s; 1 % of that is 1 s."""
    rows = 100_000
    random = torch.Generator().manual_seed(0)
    pool = Dataset.from_dict(
        {name: [f"{name} {i}" for i in range(rows)] for name in ("id", "prompt", "response")}
        | {"row": list(range(rows)), "source": ["abcde"[i % 5] for i in range(rows)]}
    )
    source_N = torch.arange(rows) % 5
    inspector = WeightInspector()
    inspector._data = SimpleNamespace(
        sets={"pool": pool}, source_names=list("abcde"), pool_sources=source_N, responses=SimpleNamespace(rows=[])
    )
    inspector._kinds = ["", "random", "", "truncated"] * (rows // 4)
    inspector._before = torch.rand(rows, generator=random)
    module = LitBilevel(PolicySettings("lit_bilevel/toy/model"), SoftmaxWeights(), OneStep())
    module.weights.build(source_N)
    module.weights.set_prior(torch.rand(rows, generator=random) + 0.1)
    board = TensorBoardLogger(tmp_path, name="", version="")
    assert board.experiment
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=board, enable_checkpointing=False)
    started = time.process_time()
    inspector.on_train_epoch_end(trainer, module)
    seconds = time.process_time() - started
    assert abs(read_jsonl(tmp_path / "inspection" / "epochs.jsonl")[0]["auroc/all"] - 0.5) < 0.02
    assert seconds < 3  # 0.20 s were measured on one core; the rest is slack for a busy machine
