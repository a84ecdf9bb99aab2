"""Ratios of step times, measured in one run so that the machine's speed cancels; peak memory, tokens a second.

    python scripts/benchmark.py step [--lora] [--rounds 5] [--clock cpu]
    python scripts/benchmark.py step --accelerator gpu        a Llama of about 1B parameters in bf16, length 1,024

Every round runs each method for some steps, one method after the other, on the same rows and a model of the same shape;
a figure is the median over rounds of the ratio of median step times, with the smallest and largest. `--clock cpu`
counts the seconds that the process had instead of those on the wall, for a machine that others use too. Memory is by
how much the process (a GPU: its allocator) grew at its peak, the model included.

FLOP utilisation is that of a plain step on both levels, whatever else a method computes:

    6·(body parameters)·tokens + 6·D·V·(response tokens) + 6·layers·D·length·tokens       (causal attention: half)

over seconds and the device's dense bf16 peak. Left out: absolute times as a result; they belong to a machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import logging
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.loops import EXTRA, METHODS, bilevel_steps, lightning_steps, plain_steps, trl_steps

TOY = Path(__file__).resolve().parents[2] / "lit_bilevel" / "toy"
DEFAULTS = {  # what is not given; gpu makes 1.07B parameters
    "cpu": {"hidden": 256, "layers": 4, "vocabulary": 4096, "tokens": 128, "batch_size": 16, "precision": "32-true"},
    "gpu": {"hidden": 2048, "layers": 16, "vocabulary": 128_256, "tokens": 1024, "batch_size": 8}
    | {"precision": "bf16-true"},
}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
PLAIN, LIGHTNING, TRL = "plain PyTorch", "Lightning SFT", "TRL SFTTrainer"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a method in a round")
    parser.add_argument("--batch_size", type=int, help="rows at each level")
    parser.add_argument("--tokens", type=int, help="tokens of a row, half of them response")
    for name in ("hidden", "layers", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--precision", choices=["32-true", "bf16-true"])
    parser.add_argument("--lora", action="store_true", help="tune a LoRA adapter of rank 16 instead of the whole model")
    parser.add_argument("--compile", action="store_true", help="compile the policy of this package")
    parser.add_argument("--activation_checkpointing", action="store_true", help="for all of them")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument(
        *("--only",),
        nargs="+",
        default=[],
        choices=METHODS,
        metavar="METHOD",
        help=f"besides mixing: {', '.join(METHODS)}",
    )
    parser.add_argument("--peak_tflops", type=float, help="of the device, for FLOP utilisation")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.accelerator].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print(step_table(options, Path(folder)))
    return 0


def step_table(options: argparse.Namespace, folder: Path) -> str:
    """The ratios of all methods, as Markdown."""
    model = save_model(options, folder / "model")
    data = save_rows(options, folder)
    runs: dict[str, Callable[..., list[float]]] = {PLAIN: plain_steps, LIGHTNING: lightning_steps}
    if importlib.util.find_spec("trl") is not None:
        runs[TRL] = trl_steps
    runs |= {name: partial(bilevel_steps, name) for name in METHODS if name == "mixing" or name in options.only}
    if not options.only:
        runs |= {name: partial(bilevel_steps, name) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float] = {}
    for round_ in range(options.rounds):
        for name in runs if round_ % 2 == 0 else reversed(runs):
            start = peak_memory(options, reset=True)
            seconds[name].append(statistics.median(runs[name](options, model, data)))
            memory[name] = max(memory.get(name, 0.0), peak_memory(options) - start)
    return "\n".join([*heading(options), *(row(name, seconds, memory, options) for name in runs), *footing(options)])


def heading(options: argparse.Namespace) -> list[str]:
    """What was run, and the columns."""
    kind = "LoRA" if options.lora else "full fine-tuning"
    device = torch.cuda.get_device_name() if options.accelerator == "gpu" else f"{torch.get_num_threads()} CPU threads"
    return [
        f"{kind}, {parameters(options) / 1e6:.0f}M parameters, {options.precision}, {options.batch_size} +"
        f" {options.batch_size} rows of {options.tokens} tokens, {options.rounds} rounds of {options.steps} steps,"
        f" {options.clock} time, torch {torch.__version__}, {device}",
        "",
        "| method | ms per step | tokens/s | × mixing | × plain PyTorch | peak MiB |",
        "|---|---|---|---|---|---|",
    ]


def row(name: str, seconds: dict[str, list[float]], memory: dict[str, float], options: argparse.Namespace) -> str:
    """One method's line."""
    median = statistics.median(seconds[name])
    ratios = [ratio(seconds[name], seconds[base]) for base in ("mixing", PLAIN)]
    tokens = f"{2 * options.batch_size * options.tokens / median:,.0f}"
    peak = peak_flops(options)
    used = "" if peak is None else f" ({step_flops(options) / median / peak:.1%} of peak FLOPs)"
    return f"| {name} | {1000 * median:.0f}{used} | {tokens} | {ratios[0]} | {ratios[1]} | {memory[name]:.0f} |"


def footing(options: argparse.Namespace) -> list[str]:
    """What is missing from the table."""
    missing = []
    if importlib.util.find_spec("trl") is None:
        missing.append("TRL is not installed (`pip install lit-bilevel[trl]`), so its line is missing.")
    if peak_flops(options) is None:
        missing.append("FLOP utilisation needs `--peak_tflops` here.")
    return ["", *missing] if missing else []


def ratio(times: list[float], base: list[float]) -> str:
    """Median ratio over rounds, with the smallest and the largest."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


# ---- floating-point operations and memory ----


def intermediate(options: argparse.Namespace) -> int:
    """Width of the feed-forward layers, a multiple of 64."""
    return -(-options.hidden * 8 // 3 // 64) * 64


def body_parameters(options: argparse.Namespace) -> int:
    """Parameters of all layers, without embedding, output layer and norms."""
    return options.layers * (4 * options.hidden**2 + 3 * options.hidden * intermediate(options))


def parameters(options: argparse.Namespace) -> int:
    """All parameters; embedding and output layer are one."""
    return body_parameters(options) + options.hidden * options.vocabulary


def step_flops(options: argparse.Namespace) -> float:
    """Of a plain step on both levels, as in the module's docstring."""
    tokens = 2 * options.batch_size * options.tokens
    output = 6 * options.hidden * options.vocabulary * tokens / 2
    attention = 6 * options.layers * options.hidden * options.tokens * tokens
    return 6 * body_parameters(options) * tokens + output + attention


def peak_flops(options: argparse.Namespace) -> float | None:
    """Dense bf16 operations a second of the device; `None` where they are not known."""
    if options.peak_tflops is not None:
        return options.peak_tflops * 1e12
    if options.accelerator == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in name), None)


def peak_memory(options: argparse.Namespace, reset: bool = False) -> float:
    """MiB at the peak since the last `reset`, which gives those in use; NaN where a system does not say."""
    if reset:
        gc.collect()
    if options.accelerator == "gpu":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if not sys.platform.startswith("linux"):
        return float("nan")
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


# ---- a model and rows of the asked size ----


def save_model(options: argparse.Namespace, folder: Path) -> str:
    """A Llama with random weights and the toy tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=intermediate(options),
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // (64 if options.hidden >= 1024 else 32)),
        max_position_embeddings=max(512, options.tokens + 8),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_rows(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Files of random letters: a pool, a validation set."""
    draw = random.Random(0)
    half = options.tokens // 2 - 1
    paths = {}
    for name, rows in (("pool", options.batch_size * (options.steps + EXTRA)), ("validation", options.batch_size * 4)):
        paths[name] = str(folder / f"{name}.jsonl")
        with open(paths[name], "w") as file:
            for i in range(rows):
                texts = ["".join(draw.choices("abcdefghij", k=half)) for _ in range(2)]
                file.write(json.dumps({"id": f"{name}{i}", "prompt": texts[0], "response": texts[1]}) + "\n")
    return paths


if __name__ == "__main__":
    sys.exit(main())
