"""SFT and DPO against plain formulas, and the frozen reference of an adapter."""

from __future__ import annotations

import pytest
import torch
from support import ranks
from support.pairs import BETA, ROWS, adapted, by_hand, pairs

from lit_bilevel import DPO, SFT, PolicySettings
from lit_bilevel.data.collate import collate
from lit_bilevel.policy.load import load_policy
from lit_bilevel.training.evaluation import Evaluation
from lit_bilevel.types import PADDING_ROW, Example


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random GPT-NeoX, which keeps float64 throughout."""
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return str(folder)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("call_cost", [float("inf"), 0.0])
def test_dpo_is_equation_7_and_so_is_its_gradient(model, packed, call_cost):
    policy, examples = adapted(model), pairs(1)
    expected_B = by_hand(policy, examples, BETA)
    batch = collate(examples, ROWS, call_cost, 0.0 if packed else None)
    loss_B = policy.losses(DPO(BETA), batch)
    assert batch.input_ids_ST.shape[0] == 2 * ROWS
    assert (loss_B - expected_B).abs().max() < 1e-10
    slopes = [torch.autograd.grad(one.mean(), policy.trainable()) for one in (loss_B, expected_B)]
    assert max(float((a - b).abs().max()) for a, b in zip(*slopes, strict=True)) < 1e-10
    assert loss_B.std() > 0.01


def test_at_its_start_the_policy_is_the_reference(model):
    policy = adapted(model, moved=False, dropout=0.3)
    batch = policy.prepare(DPO(), collate(pairs(1), ROWS))
    with policy.evaluating():
        assert torch.equal(DPO().margins(policy(batch), batch), torch.zeros(ROWS).double())
        found = Evaluation(SFT(), DPO())("test", policy, batch)
        assert float(found["test/accuracy"].compute()) == 0.5
        assert policy.losses(DPO(), batch).tolist() == pytest.approx([0.6931471805599453] * ROWS, abs=1e-15)


def test_the_sft_loss_of_a_pair_is_that_of_its_chosen_answer(model):
    policy, examples = adapted(model), pairs(1)
    alone = [Example(one.row, 0, one.input_ids, one.response_start) for one in examples]
    found, expected = (policy.losses(SFT(), collate(batch, ROWS)) for batch in (examples, alone))
    assert (found - expected).abs().max() < 1e-12


def test_pairs_that_only_fill_a_shape_count_nothing(model):
    policy, examples = adapted(model), pairs(1)
    filled = collate([*examples, Example(PADDING_ROW, 0, [1, 2, 3], 1, rejected_ids=[1, 3])], ROWS)
    loss_B = policy.losses(DPO(BETA), filled)
    assert (loss_B[:-1] - policy.losses(DPO(BETA), collate(examples, ROWS))).abs().max() < 1e-12
    assert loss_B[-1] == 0
    loss_B[-1].backward()
    assert all((parameter.grad == 0).all() for parameter in policy.trainable())


def test_the_reference_is_the_frozen_model_whatever_was_learned_or_put_in_place(model):
    policy, batch = adapted(model, dropout=0.3), collate(pairs(1), ROWS)
    base = load_policy(PolicySettings(model), torch.float64)
    expected = base(batch).detach()
    for values in (policy.trainable(), [torch.full_like(p, 7.0) for p in policy.trainable()]):
        with policy.substituted([value.detach() for value in values]):
            found = policy.prepare(DPO(), batch).reference_K
        assert (found - expected).abs().max() < 1e-12
    assert not found.requires_grad
    assert len(policy.trainable()) == 4
    assert all(module.training for module in policy.modules())
