"""Refinement in whole runs: files, resuming, and two processes that do what one does."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from support import ranks
from support.files import read_jsonl
from support.refining import refine_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel.cli import main


def test_a_run_writes_its_responses_weights_and_text(flags, tmp_path):
    folder = tmp_path / "run"
    assert main(["fit", *refine_flags(flags, folder, "--trainer.max_epochs=2")]) == 0
    records = read_jsonl(folder / "responses.jsonl")
    fields = "id row round sample response token_ids token_logprobs logprob temperature finished agreement used"
    assert set(records[0]) == set(fields.split())
    assert records[0]["logprob"] == pytest.approx(sum(records[0]["token_logprobs"]))
    table = pyarrow.parquet.read_table(folder / "weights.parquet").to_pylist()
    usable = {r["id"] for r in records if r["finished"] and len(r["token_ids"]) > 1}
    refined = {r["id"]: r["weight_refined"] for r in table if r["weight_refined"] is not None}
    assert refined.keys() == usable
    assert sum(refined.values()) / len(refined) == pytest.approx(1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = ("finished", "usable", "length", "rows", "ratio_mean", "ratio_max", "clipped", "effective_size")
    assert {f"refine/{name}" for name in names} <= set(events.Tags()["scalars"])
    text = events.Tensors("refine/responses/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| id | question | offline answer | its weight | new answers (agreement) | counts now |")


def test_a_resumed_run_repeats_the_responses_and_the_bits(flags, tmp_path):
    more = (
        "--trainer.max_epochs=3",
        "--checkpoint.every_n_steps=1",
        "--model.response_weights=SelfNormalised",
        "--model.policy.lora={r: 4, dropout: 0.2}",
    )
    assert main(["fit", *refine_flags(flags, tmp_path / "whole", *more)]) == 0
    parts = refine_flags(flags, tmp_path / "parts", *more)
    assert main(["fit", *parts, "--trainer.max_steps=15"]) == 0
    with (tmp_path / "parts" / "responses.jsonl").open("a") as file:
        file.write('{"written": "after the checkpoint"}\n')
    assert main(["fit", *parts, "--ckpt_path=last"]) == 0
    for name in ("responses.jsonl",):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    a, b = (pyarrow.parquet.read_table(tmp_path / name / "weights.parquet") for name in ("whole", "parts"))
    assert a.equals(b)
    last = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "parts")]
    assert last[0]["state_dict"].keys() == last[1]["state_dict"].keys()
    assert any(name.startswith("refinement.weights") for name in last[0]["state_dict"])
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name


def test_predictions_are_the_librarys_greedy_answers(flags, tmp_path, small):
    folder = tmp_path / "run"
    assert main(["fit", *refine_flags(flags, folder, "--trainer.max_epochs=2")]) == 0
    best = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    assert main(["predict", f"--config={folder / 'config.yaml'}", best]) == 0
    found = read_jsonl(folder / "predictions.jsonl")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    for record, test in zip(found, read_jsonl(tmp_path / small["test"]), strict=True):
        ids = torch.tensor([tokenizer(test["prompt"] + "\n").input_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=100)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert record == {"id": test["id"], "prompt": test["prompt"], "response": text}


def test_two_processes_give_the_responses_of_one(flags, tmp_path):
    """On the public code every rank generated for all prompts, and each updated its own weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = (
        "--trainer.max_epochs=2",
        "--trainer.precision=64-true",  # so that rounding in training does not reach a token
        "--model.solver=OneStep",
        "--model.solver.derivative=forward",
    )
    assert main(["fit", *refine_flags(flags, one, *more)]) == 0
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4")
    arguments = ["fit", *refine_flags(flags, two, *more, *ddp)]
    assert ranks.runs([arguments], tmp_path / "logs", 2) == [0]
    records = [read_jsonl(folder / "responses.jsonl") for folder in (one, two)]
    keys = ("id", "round", "sample", "token_ids", "finished")
    assert [[r[k] for k in keys] for r in records[0]] == [[r[k] for k in keys] for r in records[1]]
    tables = [pyarrow.parquet.read_table(folder / "weights.parquet").to_pylist() for folder in (one, two)]
    for a, b in zip(*tables, strict=True):
        assert a["weight"] == pytest.approx(b["weight"], rel=1e-3)
        assert (a["weight_refined"] is None) == (b["weight_refined"] is None)
    metrics = [json.loads((folder / "metrics.json").read_text())["test/loss"] for folder in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
