"""Injected faults: numbers that are not finite cost their step and nothing more."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lightning.pytorch import Callback
from support.refining import refine_all, run
from support.resuming import fit, short

from lit_bilevel import SFT, Mixing, OneStep, SoftmaxWeights, ValueFunction
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.losses import example_nll
from lit_bilevel.refinement.choose import LowestFraction
from lit_bilevel.refinement.response_weights import SelfNormalised
from lit_bilevel.weights import BMOWeights, NetworkWeights


@pytest.fixture
def poison(monkeypatch):
    """A set of row numbers whose loss is NaN from now on."""
    rows: set[int] = set()

    def losses(self, nll_K, batch):
        loss_B = example_nll(nll_K, batch)
        bad_B = torch.isin(batch.row_B, torch.tensor(sorted(rows), dtype=torch.int64))
        return loss_B * torch.where(bad_B, torch.nan, 1.0).to(loss_B)

    monkeypatch.setattr(SFT, "losses", losses)
    return rows


@pytest.mark.parametrize(
    ("solver", "weights"),
    [
        (OneStep(), SoftmaxWeights()),
        (ValueFunction(), SoftmaxWeights()),
        (OneStep(), NetworkWeights()),
        (Mixing(), BMOWeights()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_row_without_a_finite_loss_costs_its_step_alone(small, tmp_path, poison, solver, weights):
    poison.add(60)  # no validation row has this number
    with pytest.warns(UserWarning, match=r"policy step \d+ was skipped.*not finite on rows '.+'") as warned:
        model = run(small, tmp_path, Callback(), solver=solver, weights=weights, steps=11)
    pool = model.trainer.datamodule.sets["pool"]
    assert any(repr(pool[60]["id"]) in str(warning.message) for warning in warned)
    assert model.guard.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in model.weights.parameters())
    table = model.weights.table()
    assert table.isfinite().all()
    assert table.min() >= 0
    assert table.std() > 0


class Spoil(Callback):
    """Makes the policy's gradient infinite in one step, by its backward pass alone: all losses stay finite."""

    def __init__(self, step: int):
        self.step, self.seen = step, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.broken = batch_idx == self.step
        if not self.seen:
            pl_module.policy.trainable()[0].register_hook(lambda g: g * torch.inf if self.broken else None)

    def on_train_batch_end(self, trainer, pl_module, *rest):
        rule = pl_module.refinement.rule
        parts = {
            "weights": pl_module.weights.state_dict(),
            "groups": pl_module.refinement.weights.state_dict() if pl_module.refinement.active else {},
            "optimizer": pl_module.optimizers()[1].optimizer.state_dict() if pl_module.learns_weights else {},
            "rule": rule.state_dict(),
            "rate": pl_module.lr_schedulers().get_last_lr(),
        }
        self.seen.append(copy.deepcopy(parts))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("settings", "refined"),
    [
        ({"solver": OneStep(), "weights": SoftmaxWeights()}, False),
        ({"solver": Mixing(), "weights": BMOWeights()}, False),
        ({"solver": OneStep(), "weights": SoftmaxWeights(), "response_weights": SelfNormalised()}, True),
        (
            {
                "solver": OneStep(),
                "weights": SoftmaxWeights(),
                "weight_optimizer": functools.partial(torch.optim.SparseAdam, lr=0.1, eps=1.0),
            },
            False,
        ),
    ],
    ids=["table", "closed", "refined", "optimizer with a state"],
)
def test_a_skipped_policy_step_takes_neither_weight_step_nor_rule_along(small, tmp_path, settings, refined, accumulate):
    settings = copy.deepcopy(settings)  # an object that has learned in one module is refused in another
    spoil = Spoil(3)
    watch = refine_all(choose=LowestFraction(0.9), responses=1) if refined else Callback()
    with pytest.warns(UserWarning, match="was skipped.*every row of the pool has a finite loss"):
        model = run(small, tmp_path, watch, watch=[spoil], steps=5, accumulate_grad_batches=accumulate, **settings)
    assert model.guard.skipped == 1
    before, skipped, after = spoil.seen[2:5]
    torch.testing.assert_close(skipped, before, rtol=0, atol=0, equal_nan=True)
    for part in ("groups", "rule") if refined else ("weights",):
        assert str(after[part]) != str(skipped[part]), part


def test_validation_rows_without_a_finite_loss_spoil_no_later_score(small, tmp_path, poison):
    class Heal(Callback):
        def on_train_batch_end(self, *rest):
            poison.clear()

    poison.update(range(30))
    with pytest.warns(UserWarning, match="was skipped"):
        model = run(small, tmp_path, Heal(), steps=6)
    assert all(value.isfinite().all() for value in model.solver.state_dict()["average"])
    assert model.weights.table().std() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `pytest.warns` shows again what is filtered elsewhere
def test_many_skipped_steps_in_a_row_end_in_a_checkpoint_of_the_last_good_state(small, tmp_path, poison, capsys):
    class Break(Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 5:
                poison.update(range(90))

    flags = short(small, tmp_path)
    with pytest.warns(UserWarning, match="was skipped"), pytest.raises(UserError, match="3 policy steps in a row"):
        fit(flags, "--model.guard.max_skipped_steps=3", "--checkpoint.every_n_steps=1", callbacks=(Break(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    state = checkpoint["state_dict"]
    assert all(
        value.isfinite().all() for name, value in state.items() if name.startswith("policy.") or "logits" in name
    )
    poison.clear()
    assert main(["fit", *flags, "--ckpt_path=last"]) == 0
