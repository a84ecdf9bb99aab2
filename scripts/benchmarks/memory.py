"""Peak memory and time of the token losses, forward and backward, against the full-logits version.

    python scripts/benchmark.py memory [--vocabulary 128000] [--accelerator gpu --dtype bfloat16]

    full logits        what a causal LM does with `labels`: [B, T, V] logits in float32 at every position
    response, at once  [K, V] logits at response positions
    lit_bilevel        the same losses in chunks

On a CPU each version runs in a process of its own, and the figure is by how much its resident memory grew at its peak;
on a GPU it is by how much the allocator's memory did. Hidden states and output layer exist before; their gradients
count. Seconds on a CPU are those that the process had, so other work does not count. Left out: the decoder, whose
memory is the same for all three.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_bilevel.losses import OutputLayer, logits_nll, token_nll

LIMIT = 0.25
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def full(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, response_N: Tensor) -> Tensor:
    """All positions through the output layer, those that are not learned ignored."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, target_N.masked_fill(~response_N, -100), reduction="sum")


def at_once(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, response_N: Tensor) -> Tensor:
    """Response positions through the output layer, in one piece."""
    return logits_nll(F.linear(hidden_ND[response_N], weight_VD), target_N[response_N]).sum()


def in_chunks(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, response_N: Tensor) -> Tensor:
    """The losses that the policy computes."""
    return token_nll(hidden_ND[response_N], OutputLayer(weight_VD), target_N[response_N]).sum()


VERSIONS: dict[str, Loss] = {"full logits": full, "response, at once": at_once, "lit_bilevel": in_chunks}


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak MiB above the inputs in the first pass, seconds of the fastest later one, and the loss."""
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if options.accelerator == "gpu" else "cpu"), getattr(torch, options.dtype)
    positions = options.rows * options.tokens
    hidden_ND = torch.randn(positions, options.hidden, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(options.vocabulary, options.hidden, device=device) / options.hidden**0.5).to(dtype)
    weight_VD.requires_grad_()
    target_N = torch.randint(options.vocabulary, (positions,), device=device)
    response_N = torch.arange(positions, device=device) % options.tokens >= options.tokens // 2
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    before, seconds = memory(device, reset=True), []
    for step in range(options.repeats + 1):
        start = clock()
        loss = VERSIONS[name](hidden_ND, weight_VD, target_N, response_N)
        loss.backward()
        value = float(loss)  # waits for a GPU
        seconds.append(clock() - start)
        if step == 0:
            peak = memory(device) - before
        hidden_ND.grad = weight_VD.grad = None
    return {"mib": peak, "seconds": min(seconds[1:]), "loss": value}


def memory(device: torch.device, reset: bool = False) -> float:
    """Peak MiB so far; after a `reset`, which only a GPU has, those in use now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Print one line a version; the status is 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row, half of them response")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--only", choices=list(VERSIONS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        torch.set_num_threads(1)
        print(json.dumps(measured(options.only, options)))
        return 0
    given = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    peaks = {}
    for name in VERSIONS:
        command = [sys.executable, __file__, *given, f"--only={name}"]
        peaks[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    base = peaks["full logits"]
    print(f"{options.rows} rows of {options.tokens} tokens, vocabulary {options.vocabulary:,}, {options.dtype}\n")
    print("| losses | peak MiB | × full logits | seconds | × full logits |\n|---|---|---|---|---|")
    for name, row in peaks.items():
        ratios = row["mib"] / base["mib"], row["seconds"] / base["seconds"]
        print(f"| {name} | {row['mib']:.0f} | {ratios[0]:.2f} | {row['seconds']:.2f} | {ratios[1]:.2f} |")
    agree = abs(peaks["lit_bilevel"]["loss"] / base["loss"] - 1) < 1e-3
    return int(not agree or peaks["lit_bilevel"]["mib"] > LIMIT * base["mib"])


if __name__ == "__main__":
    sys.exit(main())
