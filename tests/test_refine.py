"""Refinement in training: ratios, weights, files, resuming, and two processes that do what one does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial, partialmethod
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback
from support.files import ROOT, TOY, read_jsonl, write_jsonl
from support.refining import Logged, features, refine_all, refine_flags, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel import BilevelDataModule, Mixing, SelfRefine, SoftmaxWeights
from lit_bilevel.callbacks import BelowThreshold, LowestFraction, RandomFraction
from lit_bilevel.cli import main
from lit_bilevel.data.table import has_question
from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import Sampling
from lit_bilevel.policy.load import LoraSettings
from lit_bilevel.refinement.groups import Refinement
from lit_bilevel.refinement.response_weights import (
    Aligned,
    LengthNormalised,
    SelfNormalised,
    SequenceRatio,
    TokenRatio,
    UniformRatio,
)
from lit_bilevel.weights import UniformWeights


class SpyUniform(UniformRatio):
    """Remembers all ratios."""

    def __init__(self):
        self.seen = []

    def weigh(self, ratios):
        self.seen.append(ratios.log_ratio_J)
        return super().weigh(ratios)


# ---- ratios ----


@pytest.mark.parametrize(
    "sampling", [Sampling(8), Sampling(8, 0.6), Sampling(8, 1.5), Sampling(8, 0.9, 5, 0.8)], ids=str
)
def test_a_frozen_policy_has_ratios_of_one(small, tmp_path, sampling):
    """The public code's labels were shifted twice: ratios of an unchanged policy ranged from 0.05 to 10."""
    spy, logged = SpyUniform(), Logged()
    run(small, tmp_path, refine_all(sampling=sampling), lr=0.0, watch=[logged], response_weights=spy)
    assert len(spy.seen) >= 5
    assert torch.cat(spy.seen).exp().sub(1).abs().max() < 1e-5
    assert logged.steps[-1]["refine/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert logged.steps[-1]["refine/clipped"] == 0
    assert logged.steps[-1]["refine/effective_size"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("precision", "policy"),
    [
        ("bf16-mixed", {}),
        ("bf16-true", {}),
        ("bf16-mixed", {"dtype": "bfloat16", "lora": LoraSettings(4)}),
        ("bf16-true", {"lora": LoraSettings(4)}),
        ("bf16-mixed", {"compile": True}),
    ],
    ids=["mixed", "true", "mixed, bfloat16 base", "true, adapter", "compiled"],
)
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_frozen_policy_has_ratios_of_one_in_16_bits(small, tmp_path, monkeypatch, precision, policy):
    """The ratios were 0.93 to 1.09 when they were scored as training runs."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    spy, settings = SpyUniform(), {"trainer_settings": {"precision": precision}, "policy": policy}
    model = run(small, tmp_path, refine_all(), lr=0.0, steps=5, response_weights=spy, **settings)
    assert len(spy.seen) >= 3
    assert torch.cat(spy.seen).exp().sub(1).abs().max() < 1e-5
    narrow = {parameter.dtype for parameter in model.policy.parameters()} - {torch.float32}
    assert narrow == (set() if policy in ({}, {"compile": True}) and "mixed" in precision else {torch.bfloat16})


class Recompute(Callback):
    """Ratios from `responses.jsonl` and the policy alone, one response at a time, before every step."""

    def __init__(self, folder):
        self.file, self.expected = folder / "responses.jsonl", []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pool = pl_module.trainer.datamodule.sets["pool"]
        rows, _ = pl_module.refinement.table()
        found = []
        model, own = pl_module.policy.model, pl_module.policy.model.training
        model.eval()
        records = read_jsonl(self.file) if self.file.is_file() else []
        for row in (row - len(pool) for row in batch["lower"][0].row_B.tolist() if row >= len(pool)):
            record = pool[int(rows[row])]
            prompt = record["input_ids"][: record["response_start"]]
            for response in (r for r in records if r["id"] == record["id"] and r["finished"]):
                if len(response["token_ids"]) > 1:
                    ids = torch.tensor([prompt + response["token_ids"]])
                    with torch.no_grad():
                        logits = model(ids, use_cache=False).logits[0] / response["temperature"]
                    now = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                    for t, token in enumerate(response["token_ids"]):
                        found.append(math.exp(now[t, token].item() - response["token_logprobs"][t]))
        model.train(own)
        self.expected.append(found)


def test_logged_ratios_are_those_of_the_file(small, tmp_path):
    logged, recompute = Logged(), Recompute(tmp_path)
    run(
        small, tmp_path, refine_all(sampling=Sampling(8, 0.8)), watch=[logged, recompute], response_weights=TokenRatio()
    )
    assert not recompute.expected[1]
    for found, step in zip(recompute.expected[2:], logged.steps[2:], strict=True):
        assert step["refine/ratio_mean"] == pytest.approx(sum(found) / len(found), rel=1e-5)
        assert step["refine/ratio_max"] == pytest.approx(max(found), rel=1e-5)
    last = recompute.expected[-1]
    assert sum(abs(ratio - 1) for ratio in last) / len(last) > 1e-3


@pytest.mark.parametrize(
    "rule",
    [
        UniformRatio,
        TokenRatio,
        SequenceRatio,
        LengthNormalised,
        partial(SelfNormalised, 0.5),
        partial(Aligned, preconditioned=False),
    ],
    ids=lambda rule: getattr(rule, "func", rule).__name__,
)
@pytest.mark.parametrize("responses", [1, 3])
def test_micro_batches_change_nothing(small, tmp_path, rule, responses):
    """Offline rows, groups, shares and every rule, in double precision, one batch of 8 against four of 2."""
    tables = []
    for size in (8, 2):
        refine = refine_all(choose=RandomFraction(0.6), responses=responses, offline_share=0.3)
        model = run(
            small,
            tmp_path / str(size),
            refine,
            size=size,
            steps=5,
            response_weights=rule(),
            solver=Mixing(),
            weights=UniformWeights(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.005),  # Adam blows rounding up where ∇ is 0
            accumulate_grad_batches=8 // size,
            trainer_settings={"precision": "64-true"},
        )
        tables.append([parameter.detach().clone() for parameter in model.policy.trainable()])
    for one, other in zip(*tables, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


# ---- weights ----


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


# ---- choosing ----


def test_choosers():
    weight = torch.tensor([1.0, 0.2, 3.0, 0.2, 0.6])
    assert LowestFraction(0.4).rows(weight, 0).tolist() == [1, 3]
    assert BelowThreshold(0.61).rows(weight, 0).tolist() == [1, 3, 4]
    one, two = (RandomFraction(0.6).rows(weight * factor, 5).tolist() for factor in (1, 2))
    assert one == two
    assert len(set(one)) == 3
    assert LowestFraction(0.001).rows(weight, 0).tolist() == [1]
    tied = torch.cat([torch.zeros(50), torch.ones(50)])
    drawn = [LowestFraction(0.1).rows(tied, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) < 50
    assert sorted(drawn[0]) != list(range(10))  # not simply the first ones
    with pytest.raises(UserError, match="`fraction`"):
        LowestFraction(0)


def mixed_pool(folder, plain: int, asked: int) -> list[str]:
    rows = read_jsonl(TOY / "pool.jsonl")
    texts = [{"id": f"t{i}", "text": row["response"] + f" {i}"} for i, row in enumerate(rows[:plain])]
    files = {"texts": texts, "asked": rows[plain : plain + asked]}
    return [write_jsonl(folder / f"{name}.jsonl", records) for name, records in files.items() if records]


@pytest.mark.parametrize(
    "choose", [LowestFraction(0.5), RandomFraction(0.5), BelowThreshold(2.0)], ids=lambda rule: type(rule).__name__
)
def test_rows_without_a_question_are_never_refined(small, tmp_path, choose):
    """Of 60 plain texts 58 were replaced by what follows their first token."""
    data = small | {"pool": mixed_pool(tmp_path, 60, 30)}
    with pytest.warns(UserWarning, match="60 of 90 pool rows have no question") as told:
        model = run(data, tmp_path, refine_all(every=2, choose=choose))
    assert len([warning for warning in told if "no question" in str(warning.message)]) == 1
    chosen = model.trainer.datamodule.responses.chosen
    assert min(chosen) >= 60
    assert len(chosen) == (15 if isinstance(choose, RandomFraction) else len(chosen)) > 0
    assert {record["id"][0] for record in read_jsonl(tmp_path / "responses.jsonl")} != {"t"}


def test_a_pool_without_questions_cannot_be_refined(small, tmp_path):
    with pytest.raises(UserError, match="no row of the pool has one"):
        run(small | {"pool": mixed_pool(tmp_path, 60, 0)}, tmp_path, refine_all())


def test_a_question_that_was_cut_off_is_none(small, tmp_path):
    """From the left, until the answer alone is as long as a row may be."""
    table = BilevelDataModule(
        small["pool"], small["validation"], tokenizer=str(TOY / "model"), max_length=6, truncation="left"
    )
    table.setup()
    pool = table.sets["pool"]
    cut = [start <= 1 for start in pool["response_start"][:]]
    assert 0 < sum(cut) < len(cut)
    assert has_question(pool).tolist() == [not none_left for none_left in cut]


def test_when_to_refine():
    """The public code waited for step 5000 whatever the settings."""
    refine = SelfRefine(every_n_steps=3, start=4)
    assert [step for step in range(12) if refine.should_refine(step)] == [4, 7, 10]
    assert [step for step in range(5) if SelfRefine(every_n_steps=2, start=0).should_refine(step)] == [2, 4]
    assert [epoch for epoch in range(5) if SelfRefine().should_refine(epoch)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 2}, "both set"),
        ({"responses": 0}, "`responses` is 0"),
        ({"offline_share": 1.0}, "`offline_share` is 1"),
        ({"responses": 4, "sampling": Sampling(temperature=0)}, "would be the same"),
    ],
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        SelfRefine(**settings)


def test_sharded_policies_are_refused():
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace())
    with pytest.raises(UserError, match="ddp"):
        SelfRefine().on_fit_start(trainer, None)


# ---- the run folder, resuming, processes ----


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_bilevel", *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [read_jsonl(folder / "responses.jsonl") for folder in (one, two)]
    keys = ("id", "round", "sample", "token_ids", "finished")
    assert [[r[k] for k in keys] for r in records[0]] == [[r[k] for k in keys] for r in records[1]]
    tables = [pyarrow.parquet.read_table(folder / "weights.parquet").to_pylist() for folder in (one, two)]
    for a, b in zip(*tables, strict=True):
        assert a["weight"] == pytest.approx(b["weight"], rel=1e-3)
        assert (a["weight_refined"] is None) == (b["weight_refined"] is None)
    metrics = [json.loads((folder / "metrics.json").read_text())["test/loss"] for folder in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
