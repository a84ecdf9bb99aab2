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
    **{name: "lit_bilevel.weights" for name in ("ExampleWeights", "SigmoidWeights", "SoftmaxWeights", "UniformWeights")},
    **{name: "lit_bilevel.solvers" for name in ("BilevelSolver", "Mixing", "OneStep", "Penalty")},
    **{name: "lit_bilevel.callbacks" for name in ("BilevelCheckpoint", "Export", "RandomState", "WeightInspector")},
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_bilevel' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
