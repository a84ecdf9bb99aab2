"""Filters: which rows they prefer, how many they keep, and what they look at."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from support.comparing import compare, table_of
from support.files import TOY, write_jsonl

from lit_bilevel.cli import BilevelCLI
from lit_bilevel.comparison import filters
from lit_bilevel.comparison.filters.evidence import Evidence, row_losses
from lit_bilevel.comparison.filters.gradients import GradientSimilarity
from lit_bilevel.comparison.filters.ngrams import NgramImportance, log_importance
from lit_bilevel.comparison.results import Results
from lit_bilevel.errors import UserError
from lit_bilevel.losses import example_nll
from lit_bilevel.policy.load import LoraSettings, PolicySettings


def evidence(**known):
    """What a filter asks for, as plain values."""
    return SimpleNamespace(seed=0, truth=None, **known)


def test_loss_filters_order_rows_by_what_they_are_named_after():
    before, after = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.5, 2.0])
    seen = evidence(ids=["a", "b", "c"], losses=lambda tuned=False: after if tuned else before)
    assert filters.LowestLoss().scores(seen).argmax() == 1
    assert filters.HighestLoss().scores(seen).argmax() == 0
    assert filters.PerplexityDifference().scores(seen).tolist() == [2.0, -0.5, 0.0]


def test_learned_weights_are_joined_by_id(tmp_path):
    table = pyarrow.table({"id": ["c", "a", "b"], "weight": [0.5, 2.0, 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "weights.parquet")
    assert filters.LearnedWeights().scores(evidence(ids=["a", "b", "c"], earlier=tmp_path)).tolist() == [2.0, 1.0, 0.5]


def test_the_oracle_keeps_the_clean_rows_whatever_their_share(tmp_path):
    truth = write_jsonl(tmp_path / "t.jsonl", [{"id": str(i), "corrupted": i % 3 == 0} for i in range(9)])
    seen = evidence(ids=[str(i) for i in range(9)])
    with pytest.raises(UserError, match=r"give `--data\.truth`"):
        filters.CleanRows().scores(seen)
    seen.truth = truth
    mask = filters.CleanRows().choose(filters.CleanRows().scores(seen), keep=0.1, seed=0)
    assert mask.tolist() == [i % 3 != 0 for i in range(9)]


def test_a_share_is_kept_and_equal_scores_are_drawn_by_lot():
    score = np.repeat([3.0, 2.0, 1.0], 100)
    masks = [filters.LowestLoss().choose(score, 0.5, seed) for seed in (0, 1)]
    for mask in masks:
        assert (mask[:100].sum(), mask[100:200].sum(), mask[200:].sum()) == (100, 50, 0)
    assert (masks[0] != masks[1]).any()
    assert not (np.diff(masks[0][100:200].nonzero()[0]) == 1).all()  # not simply the first ones
    with pytest.raises(UserError, match="not finite"):
        filters.LowestLoss().choose(np.array([1.0, np.nan]), 0.5, 0)


def test_random_rows_differ_by_seed():
    one, two = (filters.RandomRows().scores(SimpleNamespace(seed=seed, ids=["x"] * 50)) for seed in (0, 1))
    assert (one != two).any()


def test_importance_prefers_texts_that_look_like_the_target():
    random = np.random.default_rng(0)
    near, far = ["apple", "pear", "plum", "fig"], ["bolt", "nut", "screw", "cog"]
    pool = [" ".join(random.choice(near if i % 2 == 0 else far, 8)) for i in range(60)]
    target = [" ".join(random.choice(near, 8)) for _ in range(30)]
    score = log_importance(pool, target)
    assert score[::2].min() > score[1::2].max()
    drawn = NgramImportance().scores(evidence(texts=lambda name: pool if name == "pool" else target))
    assert drawn[::2].mean() > drawn[1::2].mean()
    assert log_importance(pool, pool) == pytest.approx(np.zeros(60), abs=1e-9)  # nothing to prefer
    assert log_importance(["", "apple"], target).shape == (2,)


def test_gradient_similarity_is_the_cosine_with_the_mean_direction():
    pool = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    upper = torch.tensor([[3.0, 0.0], [0.5, 0.0]])
    seen = evidence(
        ids=list("abcde"),
        policy=lambda tuned, adapter: SimpleNamespace(trainable=lambda: [torch.zeros(2)]),
        row_gradients=lambda policy, name: enumerate(upper if name == "upper" else pool),
    )
    assert GradientSimilarity().scores(seen) == pytest.approx([1, 0, -1, 0.5**0.5, 0], abs=1e-6)


@pytest.fixture(scope="module")
def built(small):
    """The toy configuration, its data set up, nothing run."""
    paths = [f"--data.{name}={path}" for name, path in small.items()]
    cli = BilevelCLI(["--config=configs/quickstart.yaml", *paths, f"--data.tokenizer={TOY / 'model'}"], run=False)
    cli.datamodule.setup()
    return cli


def test_losses_and_gradients_of_rows_are_those_of_training(built):
    found = Evidence(built, None, 0)
    policy = found.policy()
    loss, tokens = row_losses(policy, built.datamodule, "upper")
    gradients = torch.stack([gradient for _, gradient in found.row_gradients(policy, "upper")])
    (window,) = built.datamodule.evaluation_loader("upper")
    batch = built.datamodule.on_before_batch_transfer(window, 0)
    mean = example_nll(policy(batch), batch).mean()
    whole = torch.cat([part.flatten() for part in torch.autograd.grad(mean, policy.trainable())])
    assert loss.mean() == pytest.approx(mean.item(), rel=1e-5)
    assert tokens.sum() == batch.length_B.sum()
    torch.testing.assert_close(gradients.mean(0), whole, rtol=1e-3, atol=1e-5)


def test_an_adapter_of_an_earlier_run_is_loaded(built, tmp_path):
    found = Evidence(built, tmp_path, 0)
    found.settings = PolicySettings(str(TOY / "model"), lora=LoraSettings(r=2))
    policy = found.policy()
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.fill_(0.1)
    policy.model.save_pretrained(tmp_path / "policy")
    assert all((parameter == 0.1).all() for parameter in found.policy(tuned=True).trainable())
    assert not all((parameter == 0.1).all() for parameter in found.policy().trainable())


def test_scores_keep_and_weight_rows_by_one_pass(small, tmp_path, monkeypatch, capsys):
    from lit_bilevel.comparison.filters import evidence

    passes, score_rows = [], evidence.score_rows
    monkeypatch.setattr(evidence, "score_rows", lambda *a, **k: passes.append(1) or score_rows(*a, **k))
    output = tmp_path / "out"
    names = ["score:ifd", "weights:density_ratio", "weights:ifd"]
    assert compare(small, output, "--methods", *names, "--max_steps", "3") == 0, capsys.readouterr()
    assert len(passes) == 1
    rows = table_of(output)
    assert set(rows) == set(names)
    assert float(rows["score:ifd"]["kept"]) == pytest.approx(0.6, abs=0.01)
    for name in names:
        assert 0 < float(rows[name]["auroc/all"]) < 1
    assert rows["score:ifd"]["auroc/all"] == rows["weights:ifd"]["auroc/all"]  # a sigmoid keeps the order
    (scores,) = output.glob("scores-*.parquet")
    ratio = pyarrow.parquet.read_table(scores)["density_ratio"].to_numpy()
    folder = Results(output, {}).run_folder("weights:density_ratio", 0)
    kept = pyarrow.parquet.read_table(folder / "weights.parquet")["weight"].to_numpy()
    np.testing.assert_allclose(kept, ratio, rtol=2e-3)  # where they began, for nothing learns
