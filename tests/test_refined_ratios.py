"""Ratios of generated responses in training: one for a frozen policy, those of the file, micro-batches."""

from __future__ import annotations

import math
from functools import partial, partialmethod

import pytest
import torch
from lightning.pytorch import Callback
from support.files import read_jsonl
from support.refining import Logged, refine_all, run

from lit_bilevel import Mixing
from lit_bilevel.callbacks import RandomFraction
from lit_bilevel.generation.base import Sampling
from lit_bilevel.policy.load import LoraSettings
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
