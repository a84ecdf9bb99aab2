"""Refinement rounds that are not trusted leave no trace, and those that are train on what was found trustworthy."""

from __future__ import annotations

import pytest
import torch
from conftest import read_jsonl
from lightning.pytorch import Callback
from test_refine import refine_all, run

from lit_bilevel.callbacks import BelowThreshold
from lit_bilevel.errors import UserError
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.policy.load import LoraSettings
from lit_bilevel.refinement.consensus import Agreement, Product
from lit_bilevel.refinement.response_weights import Aligned, SelfNormalised
from lit_bilevel.refinement.trust import Trust, Verdict


class Fixed(Trust):
    """Says what it was told to, after noting what it was shown; answers of one question agree by their number."""

    questions = 5

    def __init__(self, least):
        self.least, self.seen = least, []

    def agreement(self, answers):
        return [place / max(1, len(answers) - 1) for place in range(len(answers))]

    def judge(self, chosen, monitor):
        self.seen.append((chosen, monitor))
        return Verdict(self.least, "told so", 0.5, 0.25)


class Nothing(Callback):
    """In the place of `SelfRefine`."""


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_round_that_is_not_trusted_leaves_no_trace(small, tmp_path, dropout):
    """Bit for bit the run without refinement: policy, weights, their optimizer's state and the random numbers drawn."""
    settings = {"policy": {"lora": LoraSettings(r=4, dropout=dropout)}, "steps": 7}
    trust = Fixed(None)
    refine = refine_all(every=2, on_doubt="keep", trust=trust)
    doubted, state = run(small, tmp_path / "a", refine, **settings), torch.get_rng_state()
    alone = run(small, tmp_path / "b", Nothing(), **settings)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(doubted.policy.parameters(), alone.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(doubted.weights.table(), alone.weights.table())
    assert not doubted.refinement.active
    assert len(trust.seen) == doubted.trainer.datamodule.responses.round == 3
    records = read_jsonl(tmp_path / "a" / "responses.jsonl")
    assert {record["round"] for record in records} == {1, 2, 3}
    assert not any(record["used"] for record in records)
    rounds = read_jsonl(tmp_path / "a" / "inspection" / "rounds.jsonl")
    assert [record["verdict"]["least"] for record in rounds] == [None] * 3


def test_answers_that_agree_too_little_are_out_of_training(small, tmp_path):
    trust = Fixed(1.0)
    model = run(small, tmp_path, refine_all(on_doubt="keep", trust=trust, responses=3), steps=4)
    store = model.trainer.datamodule.responses
    assert 0 < len(store) <= 90
    assert all(r.agreement == 1.0 for row in store.rows for r in store.responses(row))
    assert {len(store.responses(row)) for row in store.rows} == {1}  # of three, the last
    records = read_jsonl(tmp_path / "responses.jsonl")
    assert {record["agreement"] for record in records if record["used"]} == {1.0}
    assert {record["agreement"] for record in records} == {0.0, 0.5, 1.0}
    chosen, monitor = trust.seen[0]
    assert (len(chosen), len(monitor)) == (90, 5)
    trusted = set(model.trainer.datamodule.sets["monitor"]["response"][:])
    assert {answered.known for answered in monitor} <= trusted


def test_nothing_is_generated_where_no_row_is_chosen(small, tmp_path):
    class Never(HFGenerate):
        def generate(self, *arguments):
            raise AssertionError

    refine = refine_all(on_doubt="keep", choose=BelowThreshold(1e-9), backend=Never())
    model = run(small, tmp_path, refine, steps=4)
    assert model.trainer.datamodule.responses.round == 0


@pytest.mark.parametrize("rule", [Agreement(), Product([Agreement(), SelfNormalised()]), Aligned()])
def test_rules_that_compare_responses_train(small, tmp_path, rule):
    model = run(small, tmp_path, refine_all(responses=3), steps=5, response_weights=rule)
    assert model.refinement.active
    assert all(torch.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_agreement_of_a_lone_response_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="`responses` of `SelfRefine` is 1"):
        run(small, tmp_path, refine_all(responses=1), response_weights=Agreement())


def test_the_mean_agreement_of_a_round_is_one(small, tmp_path):
    class Spy(Agreement):
        def __init__(self):
            self.seen = []

        def weigh(self, ratios):
            self.seen.append(ratios.agreement_R)
            return super().weigh(ratios)

    rule = Spy()
    model = run(
        small,
        tmp_path,
        refine_all(on_doubt="replace", trust=Fixed(0), responses=2, start=4),
        0.0,
        steps=15,
        response_weights=rule,
    )  # from step 4 to the end of the epoch of 12 steps, and 3 steps of the next
    store = model.trainer.datamodule.responses
    every = torch.tensor([r.agreement for row in store.rows for r in store.responses(row)])
    values = {round(float(value), 6) for part in rule.seen for value in part}
    assert values == {0.0, round(1 / float(every.mean()), 6)}
