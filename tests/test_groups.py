"""Rows and the groups that stand in for them: which of the two learns, and that a row counts once."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.files import read_jsonl
from support.refining import features, refine_all, run

from lit_bilevel import SoftmaxWeights
from lit_bilevel.callbacks import LowestFraction, RandomFraction
from lit_bilevel.refinement.groups import Refinement
from lit_bilevel.refinement.response_weights import UniformRatio


def test_refined_rows_are_frozen_and_their_groups_learn(small, tmp_path):
    class Remember(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if trainer.global_step == 2:
                self.before = pl_module.weights.logits.detach().clone()

    remember = Remember()
    refine = refine_all(choose=RandomFraction(0.5))
    model = run(small, tmp_path, refine, watch=[remember], steps=12)
    rows, weight = model.refinement.table()
    after, others = model.weights.logits.detach(), torch.ones(90, dtype=torch.bool)
    others[rows] = False
    assert len(rows) > 30
    assert torch.equal(after[rows], remember.before[rows])
    assert not torch.equal(after[others], remember.before[others])
    assert weight.mean() == pytest.approx(1)
    assert weight.std() > 1e-3
    store = model.trainer.datamodule.responses
    assert store.rows == rows.tolist()
    assert len(store.chosen) == 45


def test_a_round_keeps_rows_adds_rows_and_starts_groups_at_one(small, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.tables = []

        def on_train_batch_end(self, trainer, pl_module, *rest):
            self.tables.append(pl_module.refinement.table())

    watch = Watch()
    model = run(small, tmp_path, refine_all(every=3, choose=LowestFraction(0.2)), watch=[watch], steps=9)
    first, second = watch.tables[1], watch.tables[4]
    assert set(first[0].tolist()) <= set(model.trainer.datamodule.responses.chosen)
    assert torch.equal(second[1], torch.ones(len(second[0]), dtype=torch.float64))
    assert model.trainer.datamodule.responses.round == 3
    records = read_jsonl(tmp_path / "responses.jsonl")
    assert {record["round"] for record in records} == {1, 2, 3}
    chosen = [{record["id"] for record in records if record["round"] == round} for round in (1, 2, 3)]
    assert chosen[0] <= chosen[1] <= chosen[2]


def built(rows: list[int], share: float) -> tuple[SoftmaxWeights, Refinement]:
    offline = SoftmaxWeights()
    refinement = Refinement(offline, UniformRatio(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    offline.build(torch.zeros(6, dtype=torch.int64))
    refinement.begin_round(torch.tensor(rows, dtype=torch.int64), offline, torch.zeros(6, dtype=torch.int64), share)
    return offline, refinement


def test_a_refined_row_counts_once():
    """κ·w for the offline pair and (1−κ)·w̃ for the group; padding and rows alone as ever."""
    offline, refinement = built([1, 4], 0.25)
    with torch.no_grad():
        offline.logits.copy_(torch.tensor([0.0, 1, 2, 0, -1, 0]))
        refinement.weights.logits.copy_(torch.tensor([0.5, -0.5]))
    offline.recount()
    refinement.weights.recount()
    w, groups = offline.table().float(), refinement.weights.table().float()
    found = refinement.weigh(offline, features(0, 1, 6, 4, 7, -1))
    expected = torch.stack([w[0], 0.25 * w[1], 0.75 * groups[0], 0.25 * w[4], 0.75 * groups[1], torch.tensor(0.0)])
    torch.testing.assert_close(found, expected)
    assert groups.mean() == pytest.approx(1)


def test_without_refined_rows_nothing_changes():
    offline, refinement = built([], 0.0)
    assert not refinement.active
    torch.testing.assert_close(refinement.weigh(offline, features(0, 3, -1)), offline(features(0, 3, -1)))


def test_scores_move_groups_and_rows_apart():
    offline, refinement = built([1, 4], 0.5)
    stepped = torch.optim.SGD(offline.parameters(), lr=0.1)
    refinement.observe(offline, stepped, features(0, 1, 2, 6, 7))
    refinement.step(offline, stepped, features(0, 1, 2, 6, 7), torch.tensor([1.0, 100.0, -1.0, -5.0, 5.0]))
    logits, groups = offline.logits.detach(), refinement.weights.logits.detach()
    assert logits[0] < 0 < logits[2]
    assert logits[1] == 0  # frozen, and its score did not move the baseline of the others
    assert groups[0] > 0 > groups[1]
    torch.testing.assert_close(logits[0], -logits[2])
