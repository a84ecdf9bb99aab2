"""Generation that fails: memory that runs out, backends that break, a refresh that is begun again."""

from __future__ import annotations

import pytest
import torch
from support.files import read_jsonl
from support.refining import refine_all, refine_flags, run

from lit_bilevel import SelfRefine
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.generation.hf import HFGenerate


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


def test_a_stopped_run_begins_with_the_round_that_failed(flags, tmp_path, monkeypatch, capsys):
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
