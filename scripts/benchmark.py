"""Benchmarks, each of which prints ratios measured in one run.

    python scripts/benchmark.py step        a policy step of each method against mixing and a plain PyTorch loop
    python scripts/benchmark.py weights     the weight step at 1,000 and at 10,000,000 rows
    python scripts/benchmark.py memory      token losses at a vocabulary of 128,000 against full logits
    python scripts/benchmark.py generate    generation against one prompt at a time; a step with four responses a row
    python scripts/benchmark.py rows        start-up, memory and a policy step at 1,000,000 rows against 10,000

Options follow the name: `python scripts/benchmark.py step --lora`, `… step --help`.
"""

from __future__ import annotations

import importlib
import sys

NAMES = ("step", "weights", "memory", "generate", "rows")


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named first."""
    if not arguments or arguments[0] not in NAMES:
        print(__doc__, file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
