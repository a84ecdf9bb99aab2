"""Cost of a weight step at a large pool against a small one, and the memory of a row.

    python scripts/benchmark.py weights [--rows 1000 10000000] [--batch_size 32] [--steps 300]

A step is what `LitBilevel` does with the weights at one policy step: weights of the batch, note of the visit, gradient,
optimizer, normaliser, statistics. Rows are drawn at random. Memory is what stays between steps: parameters, buffers and
the optimizer's state. Left out: the end of an epoch, where sums are recomputed in O(N).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from lit_bilevel import (
    BMOWeights,
    ExampleWeights,
    ExponentiatedGradient,
    NetworkWeights,
    SigmoidWeights,
    SoftmaxWeights,
    SourceWeights,
)
from lit_bilevel.types import Features

WEIGHTINGS: dict[str, Callable[[], ExampleWeights]] = {
    "softmax": SoftmaxWeights,
    "sigmoid": SigmoidWeights,
    "softmax+sparse_adam": SoftmaxWeights,
    "source": SourceWeights,
    "network": NetworkWeights,
    "bmo": BMOWeights,
}


class Run:
    """One weighting on a pool of `rows` rows, ready to step."""

    def __init__(self, name: str, rows: int, batch_size: int):
        self.rows, self.batch_size = rows, batch_size
        self.weights = WEIGHTINGS[name]()
        self.weights.build(torch.arange(rows) % 4)
        parameters = list(self.weights.parameters())
        make = partial(torch.optim.SparseAdam, eps=1.0) if name.endswith("sparse_adam") else ExponentiatedGradient
        self.optimizer = make(parameters) if parameters else None
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> float:
        """Seconds of one weight step."""
        row_B = torch.randint(self.rows, (self.batch_size,), generator=self.generator)
        loss_B = torch.rand(self.batch_size, generator=self.generator, dtype=torch.float64)
        features = Features(row_B, row_B % 4, 10 + row_B % 90, loss_B)
        start = time.perf_counter()
        self.weights(features)
        self.weights.observe(features)
        if self.optimizer is not None:
            self.weights.set_gradient(features, loss_B)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.weights.after_step()
        self.weights.statistics()
        return time.perf_counter() - start

    def bytes_a_row(self) -> float:
        """Memory that stays between steps, over the number of rows."""
        tensors = [*self.weights.parameters(), *self.weights.buffers()]
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / self.rows


def measure(name: str, sizes: list[int], batch_size: int, steps: int) -> tuple[list[float], float]:
    """Median seconds of a step for each pool size, measured in turns, and the bytes a row of the largest."""
    runs = [Run(name, rows, batch_size) for rows in sizes]
    for run in runs:
        for _ in range(20):
            run.step()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(steps):
        for run, seconds in zip(runs, times, strict=True):
            seconds.append(run.step())
    return [statistics.median(seconds) for seconds in times], runs[-1].bytes_a_row()


def main(arguments: list[str] | None = None) -> int:
    """Print one line a weighting; the status is 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs=2, type=int, default=[1_000, 10_000_000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    small, large = options.rows
    print(f"| weights | step at {small:,} rows, µs | at {large:,} | ratio (≤ 1.2) | bytes a row (≤ 20) |")
    print("|---|---|---|---|---|")
    missed = False
    for name in WEIGHTINGS:
        (first, second), size = measure(name, options.rows, options.batch_size, options.steps)
        missed |= second > 1.2 * first or size > 20.01
        print(f"| {name} | {first * 1e6:.0f} | {second * 1e6:.0f} | {second / first:.2f} | {size:.1f} |", flush=True)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
