"""Runs of the same policy steps on one process or several.

A specification is a list of cases (name, strategy, precision, solver, …). Every process runs all of them in turn, so
that the libraries are imported once; the first one writes the weights and the policy that each case ended with. A case
that is a list is a command line of `lit-bilevel`, and ends with its status.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch

from support.processes import start

ROOT = Path(__file__).resolve().parents[2]


def runs(cases: list[Any], folder: Path, world_size: int, timeout: float = 1200) -> Any:
    """What each case ended with, by name, or the statuses of command lines; `world_size` processes on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    logs = [folder / f"log{rank}.txt" for rank in range(world_size)]
    for log in logs:
        log.write_text("")
    processes = start(main, (str(folder / "cases.json"), str(folder / "ends.pt")), logs)
    try:
        for process, log in zip(processes, logs, strict=True):
            process.join(timeout)
            assert process.exitcode == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return torch.load(folder / "ends.pt", weights_only=True)


def save_model(folder: Path) -> None:
    """A random GPT-NeoX that keeps float64 throughout (Llama's norms round to float32), with a tokenizer."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "lit_bilevel" / "toy" / "model")
    tokenizer.save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def save_wide_model(folder: Path) -> Path:
    """A random Llama, with a tokenizer, whose heads are as wide as the kernels of engines take them."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=264, num_attention_heads=2, num_key_value_heads=2, eos_token_id=256, **sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "lit_bilevel" / "toy" / "model").save_pretrained(folder)
    return folder


def fitted(case: dict[str, Any], callbacks: list[Any] | None = None) -> Any:
    """The module after the steps of a case, and its trainer."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
    from lightning.pytorch.strategies import ModelParallelStrategy

    import lit_bilevel as lb
    from lit_bilevel import losses
    from lit_bilevel.weights.optimizer import ExponentiatedGradient

    if "compiler" in case:
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=case["compiler"])
    seed_everything(0, verbose=False)
    losses.CHUNK_ELEMENTS = case.get("chunk", 1 << 25)
    world_size, sharded = int(os.environ.get("WORLD_SIZE", 1)), case["strategy"] == "fsdp2"
    strategies = {
        "auto": lambda: "auto",
        "ddp": lambda: "ddp",
        "fsdp2": lambda: ModelParallelStrategy(save_distributed_checkpoint=False),
        "zero1": lambda: deepspeed(1),
        "zero2": lambda: deepspeed(2),
    }
    lora = {"lora": lb.LoraSettings(**case["lora"])} if "lora" in case else {}
    plugins: list[Any] = []
    if sharded and case["precision"] == "64-true":
        plugins = [DoublePrecision()]  # Lightning refuses the flag, not the plugin
    if "scale" in case:  # of the loss, which Lightning gives to GPUs alone
        scaler = torch.amp.GradScaler("cpu", init_scale=case["scale"], backoff_factor=2.0**-12)
        plugins = [MixedPrecision(case["precision"], "cpu", scaler=scaler)]
    module = lb.LitBilevel(
        lb.PolicySettings(case["model"], **case.get("policy", {}), **lora),
        getattr(lb, case.get("weights", "SoftmaxWeights"))(),
        getattr(lb, case["solver"])(**case.get("solver_settings", {})),
        optimizer=partial(torch.optim.AdamW, lr=case.get("lr", 3e-3), eps=case.get("eps", 1e-8)),
        weight_optimizer=partial(ExponentiatedGradient, lr=0.3),
        accumulate_grad_batches=case.get("accumulate", 1),
        gradient_clip_val=case.get("clip", 1.0),
        upper_objective=getattr(lb, case.get("objective", "SFT"))(),
        lower_objective=getattr(lb, case.get("objective", "SFT"))(),
        phases=[lb.Phase(**phase) for phase in case.get("phases", [])],
        **case.get("module", {}),
    )
    callbacks = [*(callbacks or []), *(getattr(lb, name)(**own) for name, own in case.get("callbacks", {}).items())]
    trainer = Trainer(
        strategy=strategies[case["strategy"]](),
        accelerator="cpu",
        devices=world_size,
        precision=None if plugins else case["precision"],
        plugins=plugins,
        max_steps=case["steps"],
        max_epochs=-1,
        limit_val_batches=1.0 if "check_every" in case else 0,
        val_check_interval=case.get("check_every"),
        check_val_every_n_epoch=None if "check_every" in case else 1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=case["folder"],
    )
    data = lb.BilevelDataModule(
        case["pool"],
        case["validation"],
        batch_size=case["rows"] // world_size,
        packing=case.get("packing", False),
        seed=0,
    )
    trainer.fit(module, data)
    return module, trainer


def looks_kept() -> Any:
    """A callback that keeps the losses of all monitor rows, as `checkpoint.tolerance` has them."""
    from lightning.pytorch import Callback

    from lit_bilevel.callbacks.choice import losses_by_row

    class Looks(Callback):
        def __init__(self):
            self.losses: list[torch.Tensor] = []

        def on_validation_start(self, trainer, pl_module):
            pl_module.evaluation.monitor_rows = []

        def on_validation_end(self, trainer, pl_module):
            self.losses.append(losses_by_row(trainer, pl_module.evaluation.monitor_rows))

    return Looks()


def deepspeed(stage: int) -> Any:
    """Only asked for where it is installed."""
    from support.deepspeed_cpu import DeepSpeedOnCPU

    return DeepSpeedOnCPU(stage=stage)


def end(case: dict[str, Any]) -> dict[str, Any]:
    """Weights and policy after a case, whole, and losses of monitor rows at every look, [looks, M]."""
    looks = looks_kept()
    module, trainer = fitted(case, [looks] if "check_every" in case else None)
    from lit_bilevel.problem import whole

    policy = torch.cat([whole(parameter.detach()).flatten().double() for parameter in module.policy.trainable()])
    assert trainer.global_step == case["steps"]
    own = int(torch.randint(1 << 62, ()))
    random = [own] * trainer.world_size
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(random, own)
    dtypes = sorted({str(p.dtype) for p in (*module.weights.parameters(), *module.weights.buffers())})
    weights = module.weights.table().clone()
    found = {"weights": weights, "policy": policy, "random": random}
    if looks.losses:
        found["looks"] = torch.stack(looks.losses)
    return {**found, "step": trainer.global_step, "dtypes": dtypes, "skipped": module.guard.skipped}


def main(specification: str, output: str) -> None:
    """Run all cases as one of the processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cases = json.loads(Path(specification).read_text())
    if isinstance(cases[0], list):
        from lit_bilevel.__main__ import main as command_line

        ends: Any = [command_line(case) for case in cases]
    else:
        ends = {case["name"]: end(case) for case in cases}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(ends, output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
