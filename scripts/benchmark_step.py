"""Ratios of step times, measured in one run so that the machine's speed cancels.

    python scripts/benchmark.py step [--lora] [--rounds 5]

Every round runs each method for some steps, one method after the other, on the same rows and a model of the same shape;
a figure is the median over rounds of the ratio of median step times. A step is timed from one batch's end to the
next, so loading, logging and the Trainer's own loop count.

Left out: absolute times as a result; they belong to a machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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

TOY = Path(__file__).resolve().parents[1] / "lit_bilevel" / "toy"
METHODS: dict[str, Callable[[], tuple[ExampleWeights, BilevelSolver]]] = {
    "mixing": lambda: (UniformWeights(), Mixing()),
    "penalty": lambda: (SoftmaxWeights(), Penalty()),
    "bmo": lambda: (BMOWeights(), Mixing()),
    "one_step": lambda: (SoftmaxWeights(), OneStep(derivative="one_sided")),
    "value_function": lambda: (SoftmaxWeights(), ValueFunction()),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a method in a round")
    parser.add_argument("--batch_size", type=int, default=16, help="rows at each level")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row, half of them response")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--lora", action="store_true", help="tune a LoRA adapter of rank 16 instead of the whole model")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print(step_table(options, Path(folder)))
    return 0


def step_table(options: argparse.Namespace, folder: Path) -> str:
    """The ratios of all methods, as Markdown."""
    model = save_model(options, folder / "model")
    data = save_rows(options, folder)
    names = ["plain PyTorch", *METHODS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            run = plain_steps if name == "plain PyTorch" else lightning_steps
            seconds[name].append(statistics.median(run(name, options, model, data)))
    lines = [
        f"{'LoRA' if options.lora else 'full fine-tuning'}, {options.batch_size} + {options.batch_size} rows of"
        f" {options.tokens} tokens, {options.rounds} rounds of {options.steps} steps, torch {torch.__version__},"
        f" {torch.get_num_threads()} threads",
        "",
        "| method | ms per step | × mixing | × plain PyTorch |",
        "|---|---|---|---|",
    ]
    for name in names:
        ratios = [ratio(seconds[name], seconds[base]) for base in ("mixing", "plain PyTorch")]
        lines.append(f"| {name} | {1000 * statistics.median(seconds[name]):.0f} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def ratio(times: list[float], base: list[float]) -> str:
    """Median ratio over rounds, with the smallest and the largest."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


# ---- the two ways to run a step ----


class StepTimes(Callback):
    """Seconds from the end of a batch to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def lightning_steps(name: str, options: argparse.Namespace, model: str, data: dict[str, str]) -> list[float]:
    """Step times of a method through the Trainer."""
    times = StepTimes()
    lora = LoraSettings() if options.lora else None
    module = LitBilevel(PolicySettings(model, lora=lora), *METHODS[name]())
    trainer = Trainer(
        max_steps=options.steps + 3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[times],
    )
    trainer.fit(module, datamodule(options, model, data))
    return times.seconds[2:]


def plain_steps(name: str, options: argparse.Namespace, model: str, data: dict[str, str]) -> list[float]:
    """Step times of the loop one would write by hand: two forward passes with labels, one backward, AdamW."""
    policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    if options.lora:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    seconds, last = [], None
    for lower, upper in plain_batches(options, model, data):
        optimizer.zero_grad()
        loss = 0.5 * policy(**lower, use_cache=False).loss + 0.5 * policy(**upper, use_cache=False).loss
        loss.backward()
        optimizer.step()
        now = time.perf_counter()
        if last is not None:
            seconds.append(now - last)
        last = now
    return seconds[2:]


def plain_batches(
    options: argparse.Namespace, model: str, data: dict[str, str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """The same rows as padded tensors with labels."""
    sets = datamodule(options, model, data)
    sets.setup()
    for step in range(options.steps + 3):
        yield tuple(labelled(sets.sets[name], step, options.batch_size) for name in ("pool", "upper"))  # type: ignore[misc]


def labelled(dataset: Any, step: int, size: int) -> dict[str, torch.Tensor]:
    """One batch of a set, with prompt labels masked."""
    rows = [dataset[(step * size + i) % len(dataset)] for i in range(size)]
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    starts = torch.tensor([row["response_start"] for row in rows])[:, None]
    ends = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    place = torch.arange(width)[None]
    labels = torch.where((place >= starts) & (place < ends), ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (place < ends).long()}


# ---- a model and rows of the asked size ----


def save_model(options: argparse.Namespace, folder: Path) -> str:
    """A Llama with random weights and the toy tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 32),
        max_position_embeddings=max(512, options.tokens),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_rows(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Files of random letters: a pool, a validation set."""
    draw = random.Random(0)
    half = options.tokens // 2 - 1
    paths = {}
    for name, rows in (("pool", options.batch_size * (options.steps + 3)), ("validation", options.batch_size * 4)):
        paths[name] = str(folder / f"{name}.jsonl")
        with open(paths[name], "w") as file:
            for i in range(rows):
                texts = ["".join(draw.choices("abcdefghij", k=half)) for _ in range(2)]
                file.write(json.dumps({"id": f"{name}{i}", "prompt": texts[0], "response": texts[1]}) + "\n")
    return paths


def datamodule(options: argparse.Namespace, model: str, data: dict[str, str]) -> BilevelDataModule:
    """The rows as a data module."""
    return BilevelDataModule(
        data["pool"], data["validation"], tokenizer=model, batch_size=options.batch_size, max_length=options.tokens + 8
    )


if __name__ == "__main__":
    sys.exit(main())
