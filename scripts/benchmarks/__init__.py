"""The benchmarks, one file each; `scripts/benchmark.py` runs them by name."""
