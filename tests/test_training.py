"""Fits under different settings: resumed, from Python, with an adapter, accumulated, in bfloat16."""

from __future__ import annotations

import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from support.files import TOY
from support.refining import run
from transformers import AutoModelForCausalLM

import lit_bilevel.module
from lit_bilevel import BilevelDataModule, LitBilevel, LoraSettings, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.cli import BilevelCLI
from lit_bilevel.policy.load import load_policy


def fit(flags: list[str], *more: str) -> LitBilevel:
    return BilevelCLI(["fit", *flags, *more]).model


@pytest.mark.parametrize("stop", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(flags, tmp_path, stop):
    flags = [*flags, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=1"]
    whole = fit(flags, f"--trainer.default_root_dir={tmp_path / 'whole'}")
    parts = f"--trainer.default_root_dir={tmp_path / 'parts'}"
    fit(flags, parts, f"--trainer.max_steps={stop}")
    resumed = fit(flags, parts, "--ckpt_path=last")
    assert resumed.global_step == whole.global_step
    whole_state, resumed_state = whole.state_dict(), resumed.state_dict()
    # both modules now hold the monitor-best checkpoint's policy; the weights are compared from the exports
    assert whole_state.keys() == resumed_state.keys()
    for name, value in whole_state.items():
        assert torch.equal(value, resumed_state[name]), name
    a, b = (pyarrow.parquet.read_table(tmp_path / name / "weights.parquet") for name in ("whole", "parts"))
    assert a.equals(b)
    last = [torch.load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_global_step_counts_policy_steps(flags):
    model = fit(flags, "--trainer.max_steps=7", "--trainer.max_epochs=-1")
    assert model.trainer.global_step == 7
    assert int(model.weights.visits.sum()) > 0


def test_ten_lines_of_python(small, tmp_path):
    seed_everything(0)
    data = BilevelDataModule(small["pool"], small["validation"], small["test"], batch_size=8)
    model = LitBilevel(PolicySettings(str(TOY / "model")), SoftmaxWeights(), OneStep())
    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, data)
    assert trainer.test(model, data)[0]["test/loss"] > 0
    assert model.weights.table().std() > 0


@pytest.mark.parametrize("flag", ["fast_dev_run=true", "limit_train_batches=3", "overfit_batches=2"])
def test_trainer_shortcuts_work(flags, tmp_path, flag):
    model = fit(flags, f"--trainer.{flag}", "--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=1")
    expected = {"fast_dev_run=true": 1, "limit_train_batches=3": 3, "overfit_batches=2": 2}[flag]
    assert model.trainer.global_step == expected
    if "fast" in flag:
        assert not (tmp_path / "run" / "weights.parquet").exists()


def test_lora_trains_the_adapter_alone_and_checkpoints_it_alone(flags, tmp_path):
    lora = "--model.policy.lora={r: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj]}"
    model = fit(flags, lora)
    names = [name for name, parameter in model.policy.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert [name for name in saved if name.startswith("policy.")] == [f"policy.{name}" for name in names]
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(TOY / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "policy")
    for name, value in loaded.state_dict().items():
        if "lora" in name:
            assert torch.equal(value, saved[f"policy.model.{name}"])
    assert LoraSettings().r == 16


def test_the_exported_policy_has_what_was_not_trained(flags, tmp_path, monkeypatch):
    """A frozen parameter and a buffer of a model without an adapter: no checkpoint holds them."""

    def partly(*settings):
        policy = load_policy(*settings)
        policy.causal_lm.model.norm.requires_grad_(False)
        policy.causal_lm.register_buffer("bias", torch.arange(3.0))
        return policy

    monkeypatch.setattr(lit_bilevel.module, "load_policy", partly)
    fit(flags)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "model.norm" in name or "bias" in name]
    base, exported = (
        load_file(TOY / "model" / "model.safetensors"),
        load_file(tmp_path / "run/policy/model.safetensors"),
    )
    assert exported.keys() - base.keys() == {"bias"}
    assert torch.equal(exported["model.norm.weight"], base["model.norm.weight"])
    assert not torch.equal(exported["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.slow  # test_ranks.py has the same in fewer steps
def test_accumulation_equals_the_larger_batch(flags, tmp_path):
    double = ["--trainer.precision=64-true", "--trainer.max_epochs=1"]
    large = fit(flags, *double, "--data.batch_size=8", f"--trainer.default_root_dir={tmp_path / 'large'}")
    small = fit(
        flags,
        *double,
        "--data.batch_size=2",
        "--model.accumulate_grad_batches=4",
        f"--trainer.default_root_dir={tmp_path / 'small'}",
    )
    assert large.trainer.global_step == small.trainer.global_step
    assert large.weights.logits.dtype == torch.float64
    assert (large.weights.table() - small.weights.table()).abs().max() < 1e-9
    assert large.weights.table().std() > 0.05
    for a, b in zip(large.policy.trainable(), small.policy.trainable(), strict=True):
        assert (a - b).abs().max() < 1e-9


def test_bf16_keeps_the_weights_in_float32(flags):
    model = fit(flags, "--trainer.precision=bf16-true", "--trainer.max_steps=2")
    assert model.weights.logits.dtype == torch.float32
    assert model.weights.sums.dtype == torch.float64
    assert next(model.policy.parameters()).dtype == torch.bfloat16
    assert model.weights.table().std() > 0


@pytest.mark.parametrize("supported", [False, True])
def test_a_type_that_this_cpu_is_slow_in_is_told(flags, caplog, monkeypatch, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    with caplog.at_level("INFO"):
        fit(flags, "--trainer.precision=bf16-mixed", "--trainer.max_steps=1")
    assert caplog.text.count("bf16-mixed, for which this CPU has no instructions") == (0 if supported else 1)


def test_lambda_that_falls_by_steps_is_the_same_whatever_an_epoch_is(small, tmp_path):
    class Lambda(Callback):
        def on_train_batch_start(self, trainer, pl_module, *rest):
            seen.append(pl_module.current_upper_weight)

    found = []
    for size, every in ((30, 4), (10, 4), (30, None)):
        seen: list[float] = []
        falling = {"upper_weight": 0.5, "upper_weight_decay": 0.2, "upper_weight_decay_every": every}
        run(small, tmp_path, Lambda(), size=size, steps=13, **falling)
        found.append(seen)
    by_steps = [max(0.0, 0.5 - 0.2 * (step // 4)) for step in range(13)]
    assert found[:2] == [by_steps, by_steps]
    assert found[2] == [max(0.0, 0.5 - 0.2 * (step // 3)) for step in range(13)]  # three steps an epoch
