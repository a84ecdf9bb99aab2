"""Injected faults: numbers that are not finite, memory that runs out, backends that fail."""

from __future__ import annotations

import pytest
import torch
from conftest import read_jsonl
from lightning.pytorch import Callback
from test_refine import refine_all, refine_flags, run
from test_resume import fit, short

import lit_bilevel.policy.problem
from lit_bilevel import Mixing, OneStep, SelfRefine, SoftmaxWeights, ValueFunction
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.policy.generate import HFGenerate
from lit_bilevel.weights import BMOWeights, NetworkWeights


@pytest.fixture
def poison(monkeypatch):
    """A set of row numbers whose loss is NaN from now on."""
    rows: set[int] = set()
    original = lit_bilevel.policy.problem.example_nll

    def example_nll(nll_K, batch):
        loss_B = original(nll_K, batch)
        bad_B = torch.isin(batch.row_B, torch.tensor(sorted(rows), dtype=torch.int64))
        return loss_B * torch.where(bad_B, torch.nan, 1.0).to(loss_B)

    monkeypatch.setattr(lit_bilevel.policy.problem, "example_nll", example_nll)
    return rows


# ---- numbers ----


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


@pytest.mark.filterwarnings("ignore:Detected call of")  # the first step is skipped, its schedule is not
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
        fit(flags, "--model.max_skipped_steps=3", "--checkpoint.every_n_steps=1", callbacks=(Break(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    state = checkpoint["state_dict"]
    assert all(
        value.isfinite().all() for name, value in state.items() if name.startswith("policy.") or "logits" in name
    )
    poison.clear()
    assert main(["fit", *flags, "--ckpt_path=last"]) == 0


# ---- generation ----


class Tight(HFGenerate):
    """Memory for three responses."""

    def generate(self, policy, requests, *rest):
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().generate(policy, requests, *rest)


class Broken(HFGenerate):
    """Fails from the second call on."""

    calls = 0

    def generate(self, *arguments):
        Broken.calls += 1
        if Broken.calls > 1:
            raise RuntimeError("the engine died")
        return super().generate(*arguments)


def test_memory_that_runs_out_changes_no_response(small, tmp_path):
    with pytest.warns(UserWarning, match="ran out of memory"):
        tight = run(small, tmp_path / "tight", refine_all(backend=Tight()), steps=3)
    run(small, tmp_path / "whole", refine_all(), steps=3)
    keys = ("id", "sample", "token_ids", "finished")
    tables = [read_jsonl(tmp_path / name / "responses.jsonl") for name in ("tight", "whole")]
    assert [[record[key] for key in keys] for record in tables[0]] == [[r[key] for key in keys] for r in tables[1]]
    assert tight.trainer.datamodule.responses.round == 1


def test_a_backend_that_fails_leaves_the_old_responses(small, tmp_path):
    Broken.calls = 0
    refine = refine_all(every=2, backend=Broken(), on_failure="keep")
    with pytest.warns(UserWarning, match=r"refinement round 2 failed .*the engine died.*goes on with the responses"):
        model = run(small, tmp_path, refine, steps=7)
    assert model.global_step == 7
    assert model.trainer.datamodule.responses.round == 1
    assert model.refinement.active


def test_a_backend_that_fails_stops_the_run_by_default(small, tmp_path):
    Broken.calls = 1
    with pytest.raises(UserError, match=r"refinement round 1 failed .*the engine died"):
        run(small, tmp_path, refine_all(backend=Broken()))


def test_a_stopped_run_begins_with_the_refresh_that_failed(flags, tmp_path, monkeypatch, capsys):
    arguments = ["fit", *refine_flags(flags, tmp_path / "run", "--trainer.max_epochs=2")]
    with monkeypatch.context() as patch:
        patch.setattr(HFGenerate, "generate", lambda *rest, **named: 1 / 0)
        assert main(arguments) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert main([*arguments, "--ckpt_path=last"]) == 0
    assert {record["round"] for record in read_jsonl(tmp_path / "run" / "responses.jsonl")} == {1}


def test_what_to_do_on_failure_is_checked():
    with pytest.raises(UserError, match="`on_failure` is 'hope'"):
        SelfRefine(on_failure="hope")
