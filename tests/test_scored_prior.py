"""`ScoredPrior`: weights that begin at a pass of the untouched policy, or read its columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from support.files import TOY, read_jsonl, write_jsonl
from support.refining import run

from lit_bilevel import (
    BilevelDataModule,
    LitBilevel,
    Mixing,
    NetworkWeights,
    PolicySettings,
    ScoredPrior,
    SigmoidWeights,
    UniformWeights,
)
from lit_bilevel.errors import UserError
from lit_bilevel.scores.combination import combine, normal_scores, prior_weights
from lit_bilevel.scores.table import read_scores, weights_from_score

# ---- the prior ----


def test_the_weights_begin_at_the_combined_scores(small, tmp_path):
    weights = SigmoidWeights()
    module = run(small, tmp_path, ScoredPrior(sharpness=1.5), steps=4, weights=weights, solver=Mixing())
    scores = read_scores(tmp_path / "scores.parquet")
    expected = prior_weights(combine(scores.columns, ["ifd", "density_ratio", "hidden_ratio"]), 1.5)
    np.testing.assert_allclose(module.weights.table().numpy(), expected, rtol=1e-5)
    combined = scores.columns["combined"]  # what `select --by combined` and `compare` read is the default's start
    np.testing.assert_allclose(prior_weights(combined, 1.5), expected, rtol=1e-5)
    np.testing.assert_allclose(
        weights_from_score("combined", combined), prior_weights(combined, ScoredPrior().sharpness)
    )
    assert not (tmp_path / "scores.parquet.parts").exists()
    assert scores.ids == module.trainer.datamodule.sets["pool"]["id"][:]


def test_scores_are_those_of_the_untouched_policy(small, tmp_path):
    """Under LoRA, whose adapter changes nothing at the start, they are those of the base."""
    from lit_bilevel import LoraSettings

    found = []
    for lora in (None, LoraSettings(r=2)):
        folder = tmp_path / str(lora is None)
        data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=48)
        module = LitBilevel(PolicySettings(str(TOY / "model"), lora=lora), SigmoidWeights(), Mixing())
        settings = {"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        Trainer(
            max_steps=1, default_root_dir=folder, accelerator="cpu", logger=False, callbacks=[ScoredPrior()], **settings
        ).fit(module, data)
        found.append(read_scores(folder / "scores.parquet").columns)
    for name in ("loss", "ifd", "entropy"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


class Count(Callback):
    """How many parts of the pass were scored in this run."""

    def __init__(self, monkeypatch):
        from lit_bilevel.scores.sweep import Sweep

        self.parts = 0
        original = Sweep.score

        def score(sweep, *arguments):
            self.parts += 1
            return original(sweep, *arguments)

        monkeypatch.setattr(Sweep, "score", score)


def test_a_file_of_the_same_rows_and_policy_is_read_and_another_is_not(small, tmp_path, monkeypatch):
    """A run that was killed after its pass and before its first checkpoint does not score again."""
    count = Count(monkeypatch)
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    once = count.parts
    assert once > 0
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    assert count.parts == once
    fewer = {**small, "pool": write_jsonl(tmp_path / "fewer.jsonl", read_jsonl(Path(small["pool"]))[:60])}
    run(fewer, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    assert count.parts > once


def test_a_file_can_be_given_and_is_joined_by_id(small, tmp_path, monkeypatch):
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    count = Count(monkeypatch)
    records = read_jsonl(Path(small["pool"]))
    turned = {**small, "pool": write_jsonl(tmp_path / "turned.jsonl", records[::-1])}
    scores = str(tmp_path / "scores.parquet")
    module = run(turned, tmp_path / "other", ScoredPrior(scores=scores), steps=1, solver=Mixing())
    assert count.parts == 0
    known = read_scores(scores)
    expected = dict(zip(known.ids, combine(known.columns, ["ifd", "density_ratio", "hidden_ratio"]), strict=True))
    ids = module.trainer.datamodule.sets["pool"]["id"][:]
    order = np.argsort([expected[key] for key in ids])
    assert (np.diff(module.weights.table().numpy()[order]) >= -1e-6).all()
    more = {
        **small,
        "pool": write_jsonl(tmp_path / "more.jsonl", [*records, {**records[0], "id": "new", "prompt": "?"}]),
    }
    with pytest.raises(UserError, match="has no scores for 1 of 91 pool rows"):
        run(more, tmp_path / "more", ScoredPrior(scores=scores), steps=1, solver=Mixing())


def test_a_column_that_no_row_has_is_told(small, tmp_path):
    few = {**small, "validation": write_jsonl(tmp_path / "few.jsonl", read_jsonl(Path(small["validation"]))[:9])}
    told = "no row has a `{}`, so the prior is without it"
    hidden, measured = (told.format(name) for name in ("hidden_ratio", "density_ratio"))
    with pytest.warns(UserWarning, match=hidden), pytest.warns(UserWarning, match=measured):
        run(few, tmp_path, ScoredPrior(), steps=1, solver=Mixing())


def test_what_has_no_prior_is_refused(small, tmp_path):
    with pytest.raises(UserError, match=r"`columns` are weight; there are: loss, .*density_ratio"):
        ScoredPrior(columns=["weight"])
    with pytest.raises(UserError, match="`sharpness` is nan"):
        ScoredPrior(sharpness=float("nan"))
    trainer = Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(UserError, match="make the scores by `lit-bilevel score` and give the file as its `scores`"):
        ScoredPrior().setup(trainer, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`UniformWeights` are equal"):
        run(small, tmp_path, ScoredPrior(), steps=1, weights=UniformWeights(), solver=Mixing())


# ---- weights that read scores ----


def test_a_network_tells_rows_apart_by_their_scores(small, tmp_path):
    """What it learns of some rows by their column is known of the others."""
    from lit_bilevel.types import Features

    weights = NetworkWeights(columns=["ifd"])
    weights.build(torch.zeros(40, dtype=torch.int64))
    column_N = torch.linspace(-2, 2, 40)
    weights.set_columns(column_N[:, None])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    visited = torch.arange(0, 40, 2)
    ones = torch.ones(20)
    features = Features(visited, torch.zeros_like(visited), ones.long(), ones)
    for _ in range(60):
        weights.observe(features)
        weights.set_gradient(features, -column_N[visited].double())
        optimizer.step()
        optimizer.zero_grad()
    rest = torch.arange(1, 40, 2)
    unseen = weights(Features(rest, torch.zeros_like(rest), ones.long(), ones))
    assert (unseen.diff() > 0).all()
    assert unseen[-1] > 2 * unseen[0]


def test_columns_are_given_by_the_pass_and_of_the_right_shape(small, tmp_path):
    weights = NetworkWeights(columns=["ifd", "loss"])
    module = run(small, tmp_path, ScoredPrior(), steps=2, weights=weights)
    scores = read_scores(tmp_path / "scores.parquet").columns
    expected = np.stack([-normal_scores(scores["ifd"]), -normal_scores(scores["loss"])], axis=1)
    np.testing.assert_allclose(module.weights.column_NF.numpy(), expected, rtol=1e-6)
    with pytest.raises(
        UserError, match=r"the shape \(3, 1\), .* give finite ones \(90, 2\), a column for each of: ifd"
    ):
        module.weights.set_columns(torch.zeros(3, 1))
    with pytest.raises(UserError, match="`SigmoidWeights` read no scores of rows; use `NetworkWeights`"):
        SigmoidWeights().set_columns(torch.zeros(3, 1))
    with pytest.raises(UserError, match="`columns` of the weights names 'pm'"):
        run(small, tmp_path, ScoredPrior(), steps=2, weights=NetworkWeights(columns=["pm"]))
    with pytest.raises(UserError, match=r"`columns` of `model.weights` are ifd, and .* `ScoredPrior`"):
        run(small, tmp_path, Callback(), steps=2, weights=NetworkWeights(columns=["ifd"]))
