"""Which state is chosen: the latest that the monitor rows cannot tell from the lowest."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.files import TOY
from support.refining import adam

from lit_bilevel import BilevelDataModule, LitBilevel, Mixing, PolicySettings, UniformWeights
from lit_bilevel.callbacks import BilevelCheckpoint
from lit_bilevel.callbacks.choice import LatestWithin
from lit_bilevel.errors import UserError


def losses(mean: float, spread: float = 0.0) -> torch.Tensor:
    """Of 32 rows, which differ by themselves, and from other states by as much on every row but for the spread."""
    noise = torch.linspace(-1, 1, 32, dtype=torch.float64)
    own = torch.arange(32, dtype=torch.float64) % 5
    return own + mean + spread * (noise - noise.mean())


def test_a_later_state_is_taken_where_rows_cannot_tell_it_apart():
    choice = LatestWithin(1.0)
    assert choice.takes(losses(1.0))
    assert choice.takes(losses(0.9))
    assert choice.takes(losses(0.95, spread=1.0))  # higher by 0.05, with an error of 0.1
    assert not choice.takes(losses(0.95))  # on every row
    assert not choice.takes(losses(1.2, spread=1.0))


def test_one_answer_that_is_very_wrong_does_not_decide():
    choice = LatestWithin(1.0)
    before, after = losses(0.86), losses(0.70)
    before[0], after[0] = 5.0, 13.0
    assert after.mean() > before.mean()
    assert choice.takes(before)
    assert choice.takes(after)


def test_states_do_not_drift_upwards():
    """Each is compared with the lowest, not with the one before it."""
    choice = LatestWithin(1.0)
    taken = [choice.takes(losses(1.0 + 0.05 * step, spread=float(step > 0))) for step in range(6)]
    assert taken == [True, True, True, False, False, False]


def test_without_a_tolerance_the_lowest_is_taken():
    choice = LatestWithin(0.0)
    assert [choice.takes(losses(mean)) for mean in (1.0, 1.1, 0.9, 0.95)] == [True, False, True, False]


def test_losses_that_are_not_finite_are_never_the_lowest():
    choice = LatestWithin(1.0)
    assert choice.takes(losses(math.nan))  # the first look
    assert choice.takes(losses(1.0))
    assert not choice.takes(losses(math.nan))
    assert choice.takes(losses(0.9))


class Looks(Callback):
    """Losses of the monitor rows at every look."""

    def __init__(self):
        self.steps, self.rows = [], []

    def on_validation_end(self, trainer, pl_module):
        table = torch.cat(pl_module.evaluation.monitor_rows)
        self.steps.append(trainer.global_step)
        self.rows.append(table[table[:, 0].argsort(), 1])


def fit(small, folder, tolerance: float, steps: int, ckpt_path: str | None = None):
    data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=48, seed=0)
    module = LitBilevel(PolicySettings(str(TOY / "model")), UniformWeights(), Mixing(), optimizer=adam(3e-2))
    checkpoint, looks = BilevelCheckpoint(tolerance=tolerance), Looks()
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        callbacks=[checkpoint, looks],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return checkpoint, looks


def test_the_checkpoint_of_a_run_and_of_a_continued_one_is_the_state_that_is_chosen(small, tmp_path):
    """At a rate at which losses go up and down."""
    checkpoint, looks = fit(small, tmp_path / "whole", 1.0, 12)
    choice = LatestWithin(1.0)
    taken = [step for step, rows in zip(looks.steps, looks.rows, strict=True) if choice.takes(rows)]
    lowest = looks.steps[int(torch.stack(looks.rows).mean(1).argmin())]
    assert torch.load(checkpoint.best_model_path, weights_only=False)["global_step"] == taken[-1]
    assert taken[-1] != lowest  # or nothing was tried
    fit(small, tmp_path / "parts", 1.0, lowest + 1)
    last = str(tmp_path / "parts" / "checkpoints" / "last.ckpt")
    continued, _ = fit(small, tmp_path / "parts", 1.0, 12, last)
    assert torch.load(continued.best_model_path, weights_only=False)["global_step"] == taken[-1]
    assert torch.equal(continued.state_dict()["lowest"], checkpoint.state_dict()["lowest"])


def test_a_tolerance_below_zero_is_refused():
    with pytest.raises(UserError, match=r"`checkpoint\.tolerance` is -1"):
        BilevelCheckpoint(tolerance=-1)
