"""Callbacks that set weights at the end of a phase: what they refuse, and runs that end or begin elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.files import TOY, read_jsonl, write_jsonl
from support.refining import Logged, adam, refine_all, run

from lit_bilevel import (
    BilevelDataModule,
    CleanProbability,
    ClosingSweep,
    CrossFit,
    LitBilevel,
    Mixing,
    Phase,
    PolicySettings,
    ScoredPrior,
    SecondLook,
    SigmoidWeights,
    ValueFunction,
    WarmStart,
)
from lit_bilevel.callbacks import BilevelCheckpoint, second_look
from lit_bilevel.errors import UserError
from lit_bilevel.scores import sweep
from lit_bilevel.scores.learned import Learned

REST = Phase("pool", 0.5, learn_weights=False, prepare_solver=True, learning_rate=0)
TRAIN = Phase("policy", 0.5, upper_weight=0.25, learn_weights=False, learning_rate=1.0)


def fit(small, folder, callbacks, steps=6, ckpt_path=None, **settings):
    data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=48, seed=0)
    settings = {"phases": [REST, TRAIN], "solver": CrossFit(learning_rate=1e-3), **settings}
    module = LitBilevel(PolicySettings(str(TOY / "model")), SigmoidWeights(), optimizer=adam(1e-3), **settings)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*callbacks, BilevelCheckpoint(every_n_steps=1)],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


class Stop(Callback):
    """Ends a run after so many steps, as `EarlyStopping` or `max_time` would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *rest):
        trainer.should_stop = trainer.global_step >= self.step


def test_what_cannot_work_is_refused_before_the_policy_scores_the_pool(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "score", lambda *arguments: pytest.fail("the pool was scored"))
    cases = [
        ([ScoredPrior(), CleanProbability("typo")], {}, "there is no phase 'typo'"),
        ([ScoredPrior(), CleanProbability()], {"solver": ValueFunction(learning_rate=1e-3)}, "needs the solver"),
        ([ScoredPrior(), CleanProbability(), WarmStart("w")], {}, "it would overwrite the weights of `WarmStart`"),
        ([ScoredPrior(), ClosingSweep()], {}, "from the scores of a solver at rest, and the run has `CrossFit`"),
    ]
    for callbacks, settings, message in cases:
        settings = {"weights": SigmoidWeights(), "solver": CrossFit(), "phases": [REST, TRAIN], **settings}
        with pytest.raises(UserError, match=message):
            run(small, tmp_path, callbacks[0], watch=callbacks[1:], steps=4, **settings)
    few = {**small, "validation": write_jsonl(tmp_path / "few.jsonl", read_jsonl(Path(small["validation"]))[:9])}
    with pytest.raises(UserError, match=r"needs 10 validation rows .* there are \d; give more of them, or a smaller"):
        fit(few, tmp_path, [ScoredPrior(), CleanProbability()])
    with pytest.raises(UserError, match="waits for the end of a phase, and the run has none"):
        fit(small, tmp_path, [ClosingSweep()], steps=-1, phases=None, solver=ValueFunction(learning_rate=1e-3))


def test_a_solver_that_runs_nowhere_or_cannot_move_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="`CrossFit` runs in no phase; set `prepare_solver: true` in one"):
        run(
            small,
            tmp_path,
            Logged(),
            weights=SigmoidWeights(),
            solver=CrossFit(),
            phases=[
                TRAIN,
            ],
        )
    for make in (CrossFit, ValueFunction):
        with pytest.raises(UserError, match=f"`learning_rate` of `{make.__name__}` is 0; it must be above 0"):
            make(learning_rate=0)


def test_a_run_that_ends_before_its_phase_says_that_no_weights_were_set(small, tmp_path):
    with pytest.warns(UserWarning, match="before its phase 'pool' was over, so `CleanProbability` set no weights"):
        fit(small, tmp_path, [ScoredPrior(), CleanProbability(), Stop(2)])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_continued_run_needs_no_file_of_scores(small, tmp_path):
    """It may go on in another folder, and ends with the same weights."""
    whole = fit(small, tmp_path / "whole", [ScoredPrior(), CleanProbability()])
    with pytest.warns(UserWarning, match="set no weights"):
        fit(small, tmp_path / "parts", [ScoredPrior(), CleanProbability(), Stop(2)])
    last = str(tmp_path / "parts" / "checkpoints" / "last.ckpt")
    continued = fit(small, tmp_path / "elsewhere", [ScoredPrior(), CleanProbability()], ckpt_path=last)
    assert torch.equal(whole.weights.table(), continued.weights.table())
    assert whole.weights.table().std() > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_second_look_is_the_same_in_a_continued_run(small, tmp_path, monkeypatch):
    """It goes on from what the first one found, which is in the checkpoint."""

    def callbacks(*more):
        return [ScoredPrior(), CleanProbability(), SecondLook(), *more]

    before = fit(small, tmp_path / "first", [ScoredPrior(), CleanProbability()])

    def told(known_N, now_N, before_N):  # so few rows tell nothing by themselves
        return Learned(known_N / (1 + np.exp(before_N - now_N)), 1.0)

    monkeypatch.setattr(second_look, "learned_since", told)
    whole = fit(small, tmp_path / "whole", callbacks())
    with pytest.warns(UserWarning, match="its phase 'policy' was over, so `SecondLook` set no weights"):
        fit(small, tmp_path / "parts", callbacks(Stop(4)))
    last = str(tmp_path / "parts" / "checkpoints" / "last.ckpt")
    continued = fit(small, tmp_path / "elsewhere", callbacks(), ckpt_path=last)
    assert torch.equal(whole.weights.table(), continued.weights.table())
    assert not torch.equal(whole.weights.table(), before.weights.table())
    old = torch.load(last, weights_only=False)
    key = next(key for key in old["callbacks"] if key.startswith("CleanProbability"))
    del old["callbacks"][key]["probability"]
    torch.save(old, last)
    with pytest.raises(UserError, match="`SecondLook` has no probabilities to go on from"):
        fit(small, tmp_path / "third", callbacks(), ckpt_path=last)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_callback_that_is_new_behind_its_border_does_nothing(small, tmp_path):
    fit(small, tmp_path / "first", [ScoredPrior(), CleanProbability(), Stop(5)])
    last = str(tmp_path / "first" / "checkpoints" / "last.ckpt")
    before = torch.load(last, weights_only=False)["state_dict"]["weights.logits"]
    with pytest.warns(UserWarning, match="`CleanProbability` does nothing: the checkpoint is of a run without it"):
        module = fit(small, tmp_path / "second", [ScoredPrior(), CleanProbability("pool")], ckpt_path=last)
    assert torch.equal(module.weights.logits, before)


def test_scores_of_other_trusted_rows_are_refused_before_the_first_step(small, tmp_path):
    fit(small, tmp_path / "first", [ScoredPrior(), CleanProbability()])
    scores = str(tmp_path / "first" / "scores.parquet")
    again = fit(small, tmp_path / "again", [ScoredPrior(scores=scores), CleanProbability()])
    assert again.weights.table().std() > 0
    rows = read_jsonl(Path(small["validation"]))
    other = {**small, "validation": write_jsonl(tmp_path / "other.jsonl", rows[:-1])}
    with pytest.raises(UserError, match=r"no scores of the trusted rows of this run in .*first/scores\.parquet"):
        fit(other, tmp_path / "second", [ScoredPrior(scores=scores), CleanProbability()])


def test_too_few_questions_to_judge_by_are_told_at_the_start(small, tmp_path, caplog):
    run(small, tmp_path, refine_all(on_doubt="keep"), steps=1, solver=Mixing())
    assert "at least 8, and there are 6, so every round will be left out. Give more validation rows" in caplog.text
