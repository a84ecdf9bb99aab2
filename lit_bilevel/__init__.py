"""lit_bilevel: fine-tune language models on data you do not trust.

Names are imported when they are first used, so that `import lit_bilevel` and `lit-bilevel --version` are quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from lit_bilevel.version import __version__

_NAMES = {
    "lit_bilevel.module": "LitBilevel",
    "lit_bilevel.training.phases": "Phase",
    "lit_bilevel.data.module": "BilevelDataModule",
    "lit_bilevel.policy.load": "LoraSettings PolicySettings",
    "lit_bilevel.objectives": "DPO Objective SFT",
    "lit_bilevel.weights.optimizer": "ExponentiatedGradient",
    "lit_bilevel.weights": "BMOWeights ExampleWeights NetworkWeights RunningWeights SigmoidWeights SoftmaxWeights "
    "SourceWeights TableWeights UniformWeights",
    "lit_bilevel.solvers": "BilevelSolver CrossFit Implicit Mixing OneStep Penalty ValueFunction",
    "lit_bilevel.refinement.response_weights": "Aligned LengthNormalised ResponseWeights SelfNormalised SequenceRatio "
    "TokenRatio UniformRatio",
    "lit_bilevel.refinement.consensus": "Agreement Product",
    "lit_bilevel.refinement.alike": "Alike SameAnswer SameNumber SharedWords",
    "lit_bilevel.refinement.trust": "Agreed Trust",
    "lit_bilevel.generation.base": "GenerationBackend Sampling",
    "lit_bilevel.generation.hf": "HFGenerate",
    "lit_bilevel.generation.backends": "ContinuousBatching VLLM",
    "lit_bilevel.callbacks": "BelowThreshold BelowTypical BilevelCheckpoint CleanProbability ClosingSweep Export "
    "Figures LowestFraction ModelCard Predictions RandomFraction RandomState RowChooser ScoredPrior SecondLook "
    "SelfRefine Summary WarmStart WeightInspector",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_bilevel' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
