"""The ways to run a training step that `benchmark.py step` compares, on the same rows and a model of the same shape.

    lit_bilevel         any method, through the Trainer
    plain PyTorch       the loop one would write by hand: a forward pass a level with `labels`, one backward, AdamW
    Lightning SFT       the same step as a LightningModule of ten lines
    TRL                 `trl.SFTTrainer` on the rows of both levels as one batch (where `trl` is installed)

Each returns the seconds of its steps, from the end of one to the end of the next, so loading, logging and the loop
around the step count; the first two steps are dropped. Left out: accumulation, clipping and schedules.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from lit_bilevel import (
    BilevelDataModule,
    BilevelSolver,
    BMOWeights,
    ExampleWeights,
    LitBilevel,
    LoraSettings,
    Mixing,
    OneStep,
    Penalty,
    PolicySettings,
    SoftmaxWeights,
    UniformWeights,
    ValueFunction,
)

METHODS: dict[str, Callable[[], tuple[ExampleWeights, BilevelSolver]]] = {
    "mixing": lambda: (UniformWeights(), Mixing()),
    "penalty": lambda: (SoftmaxWeights(), Penalty()),
    "bmo": lambda: (BMOWeights(), Mixing()),
    "one_step": lambda: (SoftmaxWeights(), OneStep()),  # one-sided in float32, forward mode in bfloat16
    "value_function": lambda: (SoftmaxWeights(), ValueFunction()),
}
EXTRA, DROPPED = 3, 2
Data = dict[str, str]


class Watch(Callback):
    """Seconds between the ends of steps, by the wall or as this process had them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.waits = options.accelerator == "gpu"
        self.ends: list[float] = []

    def tick(self) -> None:
        """Note the end of a step."""
        if self.waits:
            torch.cuda.synchronize()
        self.ends.append(self.clock())

    def on_train_batch_end(self, *_: Any) -> None:
        self.tick()

    @property
    def seconds(self) -> list[float]:
        """Of every step that counts."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][DROPPED:]


def bilevel_steps(name: str, options: argparse.Namespace, model: str, data: Data) -> list[float]:
    """A method of this package."""
    settings = PolicySettings(
        model,
        lora=LoraSettings() if options.lora else None,
        compile=options.compile,
        activation_checkpointing=options.activation_checkpointing,
    )
    return _through_lightning(LitBilevel(settings, *METHODS[name]()), options, datamodule(options, model, data))


def lightning_steps(options: argparse.Namespace, model: str, data: Data) -> list[float]:
    """Supervised fine-tuning on both levels as one writes it with Lightning."""
    return _through_lightning(_Sft(_loaded(options, model)), options, _Pairs(options, model, data))


class _Sft(LightningModule):
    """λ = ½ on two labelled batches."""

    def __init__(self, policy: Any):
        super().__init__()
        self.policy = policy

    def training_step(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]], batch_idx: int) -> Tensor:
        lower, upper = batch
        return 0.5 * self.policy(**lower, use_cache=False).loss + 0.5 * self.policy(**upper, use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def _through_lightning(module: LightningModule, options: argparse.Namespace, data: Any) -> list[float]:
    watch = Watch(options)
    trainer = Trainer(
        max_steps=options.steps + EXTRA,
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    trainer.fit(module, data)
    return watch.seconds


def plain_steps(options: argparse.Namespace, model: str, data: Data) -> list[float]:
    """Two forward passes with labels, one backward, AdamW."""
    device = "cuda" if options.accelerator == "gpu" else "cpu"
    policy = _loaded(options, model).to(device)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    watch = Watch(options)
    for pair in _Pairs(options, model, data):
        lower, upper = ({name: value.to(device) for name, value in level.items()} for level in pair)
        optimizer.zero_grad()
        loss = 0.5 * policy(**lower, use_cache=False).loss + 0.5 * policy(**upper, use_cache=False).loss
        loss.backward()
        optimizer.step()
        watch.tick()
    return watch.seconds


def trl_steps(options: argparse.Namespace, model: str, data: Data) -> list[float]:
    """TRL's trainer on rows whose tokens and labels are those of the others."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch = Watch(options)

    class Ticks(TrainerCallback):
        """Tells the watch."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    rows = [row for pair in _Pairs(options, model, data) for level in pair for row in _unpadded(level)]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=2 * options.batch_size,
            max_steps=options.steps + EXTRA,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=options.activation_checkpointing,
            optim="adamw_torch",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            bf16=False,
            fp16=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=options.accelerator == "cpu",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            _loaded(options, model),
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Ticks()],
        )
        trainer.train()
    return watch.seconds


def _unpadded(level: dict[str, Tensor]) -> Iterator[dict[str, list[int]]]:
    lengths = level["attention_mask"].sum(1).tolist()
    for ids, labels, length in zip(level["input_ids"].tolist(), level["labels"].tolist(), lengths, strict=True):
        yield {"input_ids": ids[:length], "labels": labels[:length]}


def _loaded(options: argparse.Namespace, model: str) -> Any:
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    policy = LlamaForCausalLM.from_pretrained(model, dtype=dtype).train()
    if options.activation_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if options.lora:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    return policy


# ---- the same rows as padded tensors with labels ----


class _Pairs:
    """A batch of the pool and one of validation rows for every step."""

    def __init__(self, options: argparse.Namespace, model: str, data: Data):
        self.options = options
        module = datamodule(options, model, data)
        module.setup()
        self.sets = [module.sets[name] for name in ("pool", "upper")]

    def __len__(self) -> int:
        return self.options.steps + EXTRA

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], ...]]:
        for step in range(len(self)):
            yield tuple(_labelled(rows, step, self.options.batch_size) for rows in self.sets)


def _labelled(dataset: Any, step: int, size: int) -> dict[str, Tensor]:
    """One batch of a set, with prompt labels masked."""
    rows = [dataset[(step * size + i) % len(dataset)] for i in range(size)]
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    starts = torch.tensor([row["response_start"] for row in rows])[:, None]
    ends = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    position = torch.arange(width)[None]
    labels = torch.where((position >= starts) & (position < ends), ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (position < ends).long()}


def datamodule(options: argparse.Namespace, model: str, data: Data) -> BilevelDataModule:
    """The rows as a data module, which keeps nothing: the files are temporary."""
    return BilevelDataModule(
        data["pool"],
        data["validation"],
        tokenizer=model,
        batch_size=options.batch_size,
        max_length=options.tokens + 8,
        cache=False,
    )
