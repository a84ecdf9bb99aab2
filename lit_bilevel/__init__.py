"""lit_bilevel: fine-tune language models on data you do not trust.

Names are imported when they are first used, so that `import lit_bilevel` and `lit-bilevel --version` are quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from lit_bilevel.version import __version__

_HOMES = {
    "LitBilevel": "lit_bilevel.module",
    "BilevelDataModule": "lit_bilevel.data.module",
    "PolicySettings": "lit_bilevel.policy.load",
    "LoraSettings": "lit_bilevel.policy.load",
    "ExponentiatedGradient": "lit_bilevel.optim",
    **dict.fromkeys(
        (
            *("BMOWeights", "ExampleWeights", "NetworkWeights", "RunningWeights", "SigmoidWeights", "SoftmaxWeights"),
            *("SourceWeights", "TableWeights", "UniformWeights"),
        ),
        "lit_bilevel.weights",
    ),
    **dict.fromkeys(
        ("BilevelSolver", "Implicit", "Mixing", "OneStep", "Penalty", "ValueFunction"), "lit_bilevel.solvers"
    ),
    **dict.fromkeys(
        ("BelowThreshold", "BilevelCheckpoint", "Choose", "Export", "LowestFraction", "Predictions", "RandomFraction"),
        "lit_bilevel.callbacks",
    ),
    **dict.fromkeys(("RandomState", "SelfRefine", "WeightInspector"), "lit_bilevel.callbacks"),
    **dict.fromkeys(
        ("Aligned", "LengthNormalised", "ResponseWeights", "SelfNormalised", "Sequence", "Token", "Uniform"),
        "lit_bilevel.ratios",
    ),
    **dict.fromkeys(("GenerationBackend", "HFGenerate", "Sampling"), "lit_bilevel.policy.generate"),
    **dict.fromkeys(("ContinuousBatching", "VLLM"), "lit_bilevel.policy.backends"),
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_bilevel' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
