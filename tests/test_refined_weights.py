"""Groups of responses weighted in closed form, and ratios recomputed by a script that knows nothing of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from support.files import ROOT, TOY
from support.refining import Logged, features, refine_all, run

from lit_bilevel import (
    BMOWeights,
    ExponentiatedGradient,
    LitBilevel,
    Mixing,
    NetworkWeights,
    Phase,
    PolicySettings,
    SoftmaxWeights,
    SourceWeights,
    UniformWeights,
)
from lit_bilevel.callbacks import RandomFraction
from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import Sampling
from lit_bilevel.refinement.groups import Refinement
from lit_bilevel.refinement.response_weights import SelfNormalised, TokenRatio, UniformRatio
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.training.exchange import gather_tally


class SavedBeforeTheLastStep(Callback):
    """Saves the policy whose ratios the last step logs."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == trainer.max_steps - 1:
            pl_module.policy.model.save_pretrained(self.folder)
            pl_module.tokenizer.save_pretrained(self.folder)


def test_logged_ratios_follow_from_the_saved_policy_and_the_file(small, tmp_path):
    """Every row is refined and in every batch, so the last step's ratios are those of the whole file."""
    logged, saved = Logged(), SavedBeforeTheLastStep(tmp_path / "saved")
    refine = refine_all(sampling=Sampling(8, 0.8))
    run(small, tmp_path, refine, watch=[logged, saved], size=90, steps=6, lr=3e-3, response_weights=TokenRatio())
    script = [sys.executable, str(ROOT / "tests" / "support" / "recompute_ratios.py")]
    files = [str(tmp_path / "saved"), str(tmp_path / "responses.jsonl"), small["pool"]]
    result = subprocess.run(script + files, capture_output=True, text=True, check=True, cwd=tmp_path)
    ratios = json.loads(result.stdout)
    assert len(ratios) > 100
    assert sum(ratios) / len(ratios) == pytest.approx(logged.steps[-1]["refine/ratio_mean"], rel=1e-5)
    assert max(ratios) == pytest.approx(logged.steps[-1]["refine/ratio_max"], rel=1e-4)
    assert sum(abs(ratio - 1) for ratio in ratios) / len(ratios) > 1e-2


def test_groups_in_closed_form():
    """e^(−ℓ/τ) over its running mean, next to learned offline weights; the first window weighs 1."""
    offline = SoftmaxWeights()
    refinement = Refinement(BMOWeights(0.5), UniformRatio(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    offline.build(torch.zeros(6, dtype=torch.int64), torch.float64)
    refinement.begin_round(torch.tensor([1, 4]), offline, torch.zeros(6, dtype=torch.int64), 0.0)
    seen = replace(features(0, 6, 2, 7), loss_B=torch.tensor([9.0, 0.5, 9.0, 1.0], dtype=torch.float64))
    assert refinement.needs_loss
    assert refinement.weigh(offline, seen).tolist() == [1, 1, 1, 1]
    stepped = torch.optim.SGD(offline.parameters(), lr=0.1)
    refinement.observe(offline, stepped, seen)
    refinement.step(offline, stepped, seen, torch.tensor([1.0, 50.0, -1.0, -50.0], dtype=torch.float64))
    expected = torch.exp(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    expected /= expected.mean()
    found = refinement.weigh(offline, seen)
    torch.testing.assert_close(found[[1, 3]], expected)
    torch.testing.assert_close(refinement.table()[1], expected)
    assert found[0] < 1 < found[2]


def test_a_lone_row_or_group_takes_no_step():
    """It would be compared with itself."""
    offline = SoftmaxWeights()
    refinement = Refinement(offline, UniformRatio(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    offline.build(torch.zeros(6, dtype=torch.int64))
    refinement.begin_round(torch.tensor([1, 4]), offline, torch.zeros(6, dtype=torch.int64), 0.5)
    steps = []
    for weights in (offline, refinement.weights):
        weights.set_gradient = lambda *given: steps.append(given)
    stepped = torch.optim.SGD(offline.parameters(), lr=0.1)
    refinement.step(offline, stepped, features(0, 1, 6), torch.tensor([1.0, 5.0, -5.0]))  # row 1 is frozen
    assert not steps
    refinement.step(offline, stepped, features(0, 2, 6), torch.tensor([1.0, -1.0, 5.0]))
    assert len(steps) == 1


def test_tallies_of_micro_batches_and_of_processes_are_joined_alike():
    """The row goes with the largest ratio, whichever side has it; all else is added."""
    one, other = torch.tensor([1.0, 7, 4, 4, 0, 1, 1, 1, 3, 2]).double(), torch.arange(2.0, 12).double()
    expected = torch.cat([other[:2], (one + other)[2:]])
    tallies = [ResponseTally.unpack(numbers) for numbers in (one, other)]
    for first, second in (tallies, tallies[::-1]):
        assert torch.equal(first.merge(second).pack(), expected)
        assert torch.equal(ResponseTally.over(torch.stack([first.pack(), second.pack()])).pack(), expected)
    joined = ResponseTally.empty(2).merge(tallies[0])
    assert torch.equal(joined.pack(), one)
    assert (joined.max_ratio, joined.max_row, joined.tokens) == (1, 7, 4)
    assert joined.singles.tolist() == [3, 2]


def test_a_step_without_responses_is_not_followed():
    rule, trainer = SelfNormalised(), SimpleNamespace(world_size=1)
    refinement = Refinement(SoftmaxWeights(), rule, ExponentiatedGradient)
    refinement.follow(gather_tally(ResponseTally.empty(2), trainer))
    before = rule.state_dict()
    tally = ResponseTally.unpack(torch.tensor([1.0, 0, 4, 4, 0, 1, 1, 1, 3, 2]).double())
    assert gather_tally(tally, trainer) is tally
    refinement.follow(gather_tally(tally, trainer))
    assert rule.mean == 1.5
    assert rule.state_dict() != before


def test_groups_that_could_never_learn_are_refused():
    policy = PolicySettings(str(TOY / "model"))
    for weights in (BMOWeights(), UniformWeights()):
        with pytest.raises(UserError, match=r"`model.refined_weights` is `SoftmaxWeights`.*use `BMOWeights`"):
            LitBilevel(policy, weights, Mixing(), refined_weights=SoftmaxWeights())
        LitBilevel(policy, weights, Mixing(), refined_weights=BMOWeights())


@pytest.mark.parametrize(
    ("learning", "refined", "told"), [(0.75, None, False), (0.25, None, True), (0.25, BMOWeights(), False)]
)
def test_groups_that_no_phase_teaches_are_told(small, tmp_path, caplog, learning, refined, told):
    """The first answers come after the second of four steps."""
    phases = [Phase("weights", learning, 0.5), Phase("policy", 1 - learning, 0.5, learn_weights=False)]
    with caplog.at_level("INFO"):
        module = run(small, tmp_path, refine_all(), steps=4, phases=phases, refined_weights=refined)
    assert ("every group of them weighs 1" in caplog.text) == told
    weight_M = module.refinement.weights.table()
    assert (weight_M.std() == 0) == told


def test_groups_are_gated_at_the_end_of_an_epoch(small, tmp_path):
    refine = refine_all(choose=RandomFraction(0.6))
    model = run(small, tmp_path, refine, steps=24, refined_weights=SoftmaxWeights(keep=0.5, cap=2.5))
    weight = model.refinement.table()[1]
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert weight.max() <= 2.5 + 1e-6


def test_closed_form_groups_in_a_run(small, tmp_path):
    """Micro-batches change nothing; answers that the policy finds unlikely weigh less."""
    tables = []
    for size in (8, 2):
        model = run(
            small,
            tmp_path / str(size),
            refine_all(choose=RandomFraction(0.6)),
            size=size,
            refined_weights=BMOWeights(0.2),
            solver=Mixing(),
            weights=SoftmaxWeights(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.005),
            accumulate_grad_batches=8 // size,
            trainer_settings={"precision": "64-true"},
        )
        tables.append([parameter.detach().clone() for parameter in model.policy.trainable()])
        weight = model.refinement.table()[1]
        loss = model.refinement.weights.loss_N
        seen = ~loss.isnan()
        assert seen.sum() > 20
        assert torch.equal(weight[seen].argsort(), (-loss[seen]).argsort())
    for one, other in zip(*tables, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


@pytest.mark.parametrize("weights", [SourceWeights, NetworkWeights])
def test_groups_need_not_have_every_source_of_the_pool(weights):
    offline, source_N = weights(), torch.tensor([0, 1, 0, 1])
    refinement = Refinement(weights(), UniformRatio(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    offline.build(source_N, torch.float64)
    refinement.begin_round(torch.tensor([0, 2]), offline, source_N, 0.0)  # source 0 alone
    seen = replace(features(1, 4), source_B=torch.tensor([1, 0]), loss_B=torch.ones(2, dtype=torch.float64))
    assert refinement.weigh(offline, seen).tolist() == [1, 1]
