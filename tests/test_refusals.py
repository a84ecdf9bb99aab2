"""Combinations that cannot work are refused before anything is loaded, by name and with the way out."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from support.files import TOY

from lit_bilevel import (
    BMOWeights,
    Implicit,
    LitBilevel,
    LoraSettings,
    Mixing,
    OneStep,
    Penalty,
    PolicySettings,
    SoftmaxWeights,
    UniformWeights,
)
from lit_bilevel.callbacks import SelfRefine
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.policy import compile as compiling
from lit_bilevel.policy import load
from lit_bilevel.policy.compile import compile_layers
from lit_bilevel.policy.load import load_policy
from lit_bilevel.refinement.response_weights import Aligned
from lit_bilevel.training.engine import _keeps_digits
from lit_bilevel.training.refusals import check_flags, check_precision, check_run

PATH = str(TOY / "model")
LORA = LoraSettings(r=2)


def deepspeed(stage: int) -> DeepSpeedStrategy:
    """A strategy whose package need not be there."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


LENGTH = {"max_epochs": 1, "max_steps": -1}
POLICY = {"lora", "quantization", "attn_implementation", "compile"}


def module(strategy, *, solver=None, weights=None, precision="32-true", length=LENGTH, **settings):
    """A `LitBilevel` under as much of a Trainer as its settings."""
    policy = PolicySettings(PATH, **{name: settings.pop(name) for name in POLICY & settings.keys()})
    made = LitBilevel(policy, weights or SoftmaxWeights(), solver or OneStep(), **settings)
    made.trainer = SimpleNamespace(strategy=strategy, precision=precision, callbacks=[], **length)
    return made


ONE = SingleDeviceStrategy("cpu")
REFUSED = {
    "fsdp1": (lambda: module(FSDPStrategy()), r"FSDP1 .*; use FSDP2 \(configs/strategies/fsdp2.yaml\) or `ddp`"),
    "views of buckets": (lambda: module(DDPStrategy(gradient_as_bucket_view=True)), r"leave it out"),
    "implicit under fsdp2": (lambda: module(ModelParallelStrategy(), solver=Implicit()), r"`Implicit` .*use `OneStep`"),
    "quantized under fsdp2": (
        lambda: module(ModelParallelStrategy(), solver=Penalty(), lora=LORA, quantization="4bit"),
        r"quantized policy cannot be sharded by FSDP2; use `trainer.strategy: ddp`",
    ),
    "compiled under fsdp2": (
        lambda: module(ModelParallelStrategy(), compile=True),
        r"`model.policy.compile` and FSDP2",
    ),
    "one step under zero 3": (lambda: module(deepspeed(3)), r"`OneStep` evaluates .*; use `Penalty`, or FSDP2"),
    "weights under zero 3": (
        lambda: module(deepspeed(3), solver=Penalty()),
        r"stage 3 would split .*; use stage 2",
    ),
    "clipping under zero": (
        lambda: module(deepspeed(2), solver=Penalty(), gradient_clip_val=1.0),
        r"`gradient_clipping` in",
    ),
    "accumulation under zero": (
        lambda: module(deepspeed(2), solver=Penalty(), accumulate_grad_batches=2),
        r"raise `data.batch_size`",
    ),
    "no zero": (lambda: module(deepspeed(0), solver=Penalty()), r"DeepSpeed without ZeRO .*; use stage 1 or 2"),
    "compiled under zero": (lambda: module(deepspeed(2), solver=Penalty(), compile=True), r"`model.policy.compile`"),
    "one step on four bits": (
        lambda: module(ONE, lora=LORA, quantization="4bit"),
        r"`OneStep` .*; use `ValueFunction`",
    ),
    "one step with flash": (
        lambda: module(ONE, attn_implementation="flash_attention_2"),
        r"no forward mode; use `sdpa`",
    ),
    "aligned responses on four bits": (
        lambda: module(
            ONE, solver=Mixing(), weights=BMOWeights(), response_weights=Aligned(), lora=LORA, quantization="4bit"
        ),
        r"`Aligned` needs derivatives .*`model.response_weights` than `Aligned`",
    ),
    "aligned responses under zero": (
        lambda: module(deepspeed(2), solver=Penalty(), response_weights=Aligned()),
        r"`Aligned` evaluates",
    ),
    "mps": (lambda: module(SingleDeviceStrategy("mps")), r"no float64.*use `trainer.accelerator: cpu`"),
    "half precision": (lambda: module(ONE, precision="16-true"), r"`trainer.precision` is 16-true.*use bf16-true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused(name):
    made, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        check_run(made(), "fit")


ACCEPTED = {
    "fsdp2": lambda: module(ModelParallelStrategy()),
    "penalty under zero 2": lambda: module(deepspeed(2), solver=Penalty()),
    "bmo on four bits": lambda: module(ONE, solver=Mixing(), weights=BMOWeights(), lora=LORA, quantization="4bit"),
    "compiled": lambda: module(ONE, compile=True),
    "bf16": lambda: module(ONE, precision="bf16-true"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_run_is_not(name):
    check_run(ACCEPTED[name](), "fit")


BAD = {
    "a solver that is not asked": (
        {"weights": UniformWeights(), "solver": OneStep()},
        r"`UniformWeights`, which learns nothing from scores, so `model.solver: OneStep` would do nothing; use",
    ),
    "closed form at λ = 0": (
        {"weights": BMOWeights(), "solver": Mixing(), "upper_weight": 0.0},
        r"`model.upper_weight` is 0.0, so λ is 0 in some step, where `BMOWeights` has no meaning",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_would_do_nothing_are_refused(name):
    settings, message = BAD[name]
    with pytest.raises(UserError, match=message):
        LitBilevel(PolicySettings(PATH), **settings)


def test_groups_in_closed_form_need_an_upper_level_where_there_are_groups():
    made = module(ONE, upper_weight=0.0, refined_weights=BMOWeights())
    made.trainer.callbacks = [SelfRefine()]
    with pytest.raises(UserError, match=r"`model.upper_weight` is 0, where `BMOWeights` for refined rows has no"):
        check_run(made, "fit")


def test_the_epoch_in_which_the_upper_level_vanishes_is_named():
    made = module(ONE, solver=Penalty(), upper_weight=0.3, upper_weight_decay=0.1, length=LENGTH | {"max_epochs": 9})
    with pytest.raises(UserError, match="λ is 0 in epoch 4, where `Penalty` has no meaning"):
        check_run(made, "fit")
    made.upper_weight_decay_every = 100
    with pytest.raises(UserError, match="λ is 0 after 300 policy steps, where `Penalty` has no meaning"):
        check_run(made, "fit")  # nine epochs may have so many
    made.trainer.max_steps = 300
    check_run(made, "fit")


def test_a_checkpoint_is_not_loaded_by_itself():
    with pytest.raises(UserError, match="`policy/` of the run folder with `from_pretrained`"):
        LitBilevel.load_from_checkpoint("last.ckpt")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_attention_whose_package_is_missing():
    with pytest.raises(UserError, match=r"no causal language model could be loaded .*[Ff]lash"):
        load_policy(PolicySettings(PATH, attn_implementation="flash_attention_2"), torch.float32)


def test_differences_need_products_with_all_digits():
    found = {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        found[precision] = [_keeps_digits(name) for name in ("32-true", "64-true", "bf16-mixed")]
    torch.set_float32_matmul_precision("highest")
    assert found == {"highest": [True, True, False], "high": [False, True, False], "medium": [False, True, False]}


def test_all_problems_come_in_one_message():
    with pytest.raises(UserError, match="4 problems"):
        check_run(module(deepspeed(3), gradient_clip_val=1.0, accumulate_grad_batches=2), "fit")


@pytest.mark.parametrize(("flag", "value"), [("gradient_clip_val", 1.0), ("accumulate_grad_batches", 2)])
def test_flags_of_the_trainer_that_are_arguments_here(flag, value):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **{flag: value})
    with pytest.raises(UserError, match=rf"`trainer.{flag}` is {value}; set `model.{flag}` instead"):
        check_flags(trainer)


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*")
def test_loss_scaling_on_a_cpu(flags, capsys):
    assert main(["fit", *flags, "--trainer.precision=16-mixed"]) == 2
    assert "`trainer.precision` is 16-mixed, which CPUs do not have; use bf16-mixed" in capsys.readouterr().err
    check_precision("16-mixed", SimpleNamespace(precision="16-mixed"))
    check_precision("bf16-mixed", SimpleNamespace(precision="bf16-mixed"))


def test_an_unknown_quantization_is_refused():
    with pytest.raises(UserError, match=r"`model.policy.quantization` is '2bit'; it must be 4bit, 8bit, or null"):
        load_policy(PolicySettings(PATH, lora=LORA, quantization="2bit"), torch.float32)


def test_a_quantized_base_needs_an_adapter_and_its_library(monkeypatch):
    with pytest.raises(UserError, match=r"cannot be tuned; set `model.policy.lora`"):
        load_policy(PolicySettings(PATH, quantization="4bit"), torch.float32)
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes; install `lit-bilevel\[gpu\]`"):
        load_policy(PolicySettings(PATH, lora=LORA, quantization="4bit"), torch.float32)


def test_compiling_needs_a_compiler_and_layers(monkeypatch):
    policy = load_policy(PolicySettings(PATH), torch.float32)
    monkeypatch.setattr(policy.causal_lm, "_no_split_modules", [])
    with pytest.raises(UserError, match="does not say which of its parts are layers"):
        compile_layers(policy, on_cpu=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler on a CPU, and there is none"):
        compile_layers(policy, on_cpu=True)


def test_a_base_of_few_digits_takes_forward_mode():
    for dtype, precise in (("bfloat16", False), ("float32", True)):
        policy = load_policy(PolicySettings(PATH, dtype=dtype, lora=LORA), torch.float32)
        assert policy.trainable()[0].dtype == torch.float32
        assert policy.precise is precise
