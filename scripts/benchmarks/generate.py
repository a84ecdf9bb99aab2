"""Throughput of generation, and of a training step on generated responses.

    python scripts/benchmark.py generate                          # tokens/s, batched against one prompt at a time
    python scripts/benchmark.py generate --policy DIR --prompts 64 --new 64 --device cuda
    python scripts/benchmark.py generate step --responses 4        # one batched forward against one per response

The prompts are those of the toy test set, repeated; both sides generate the same number of tokens by the same code.
Left out: other engines; they need an accelerator and a policy that fits them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel.data.collate import collate
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.rows import Source
from lit_bilevel.generation.base import Request, Sampling
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.generation.respond import score
from lit_bilevel.losses import example_nll
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Example, Group, Row

TOY = Path(__file__).resolve().parents[2] / "lit_bilevel" / "toy"


def timed(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def requests_for(tokenizer, count: int, new: int) -> list[Request]:
    rows = Source(str(TOY / "test.jsonl")).read()
    prompts = Encoder(tokenizer, 512).prompts([row.prompt for row in rows if isinstance(row, Row)])
    return [Request(prompts[i % len(prompts)], (0, 0, i, 0), new) for i in range(count)]


def benchmark_generation(policy: Policy, requests: list[Request], new: int, repeats: int, device: str) -> None:
    sampling, backend = Sampling(new), HFGenerate()

    def together() -> int:  # no end token: both sides generate exactly as much
        return sum(len(sample.token_ids) for sample in backend.generate(policy, requests, sampling, []))

    def alone() -> int:
        return sum(len(backend.generate(policy, [r], sampling, [])[0].token_ids) for r in requests)

    tokens = together()
    fast, slow = timed(together, repeats, device), timed(alone, repeats, device)
    print(f"{len(requests)} prompts, {tokens} tokens: batched {tokens / fast:.0f} tokens/s, one at a time")
    print(f"{tokens / slow:.0f} tokens/s: {slow / fast:.1f} times as fast")


def benchmark_step(
    policy: Policy, requests: list[Request], responses: int, new: int, repeats: int, device: str
) -> None:
    """Half of the rows offline, half with G responses; forward and backward."""
    many = [Request(r.prompt_ids, (*r.stream[:3], g), new) for r in requests for g in range(responses)]
    samples = HFGenerate().generate(policy, many, Sampling(new), [])
    scored = score(policy, many, samples, 1.0, torch.device(device))
    examples = []
    for i, request in enumerate(requests):
        own = tuple(scored[i * responses : (i + 1) * responses])
        start = len(request.prompt_ids)
        if i % 2:
            examples.append(Example(i, 0, request.prompt_ids, start, Group(own, float(new), 1.0)))
        else:
            examples.append(Example(i, 0, request.prompt_ids + own[0].token_ids, start))
    batch = collate(examples, len(examples)).to(torch.device(device))
    parts = []
    for example in examples:
        if example.group is None:
            parts.append(example)
        else:
            parts += [
                Example(0, 0, example.input_ids + r.token_ids, len(example.input_ids)) for r in example.group.responses
            ]
    singles = [collate([part], len(examples)).to(torch.device(device)) for part in parts]

    def together() -> None:
        example_nll(policy(batch), batch).sum().backward()

    def one_by_one() -> None:
        for single in singles:
            example_nll(policy(single), single).sum().backward()

    fast, slow = timed(together, repeats, device), timed(one_by_one, repeats, device)
    print(f"{len(examples)} rows, G = {responses}: one batched forward and backward {1000 * fast:.0f} ms,")
    print(f"one per response {1000 * slow:.0f} ms: {slow / fast:.1f} times as fast")


def main(arguments: list[str] | None = None) -> None:
    """Run one of the two measurements and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=("generate", "step"), default="generate")
    parser.add_argument("--policy", default=str(TOY / "model"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_pretrained(options.policy).to(options.device)).train()
    requests = requests_for(AutoTokenizer.from_pretrained(options.policy), options.prompts, options.new)
    if options.what == "generate":
        benchmark_generation(policy, requests, options.new, options.repeats, options.device)
    else:
        benchmark_step(policy, requests, options.responses, options.new, options.repeats, options.device)


if __name__ == "__main__":
    main()
