"""Sets and policies that a scoring pass reads."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_bilevel import BilevelDataModule, PolicySettings
from lit_bilevel.policy.load import load_policy


def rows_of(model: Path, small: dict[str, str], **settings) -> BilevelDataModule:
    data = BilevelDataModule(small["pool"], small["validation"], tokenizer=str(model), cache=False, **settings)
    data.setup()
    return data


def policy_of(model: Path):
    return load_policy(PolicySettings(str(model), dtype="float64"), torch.float64)
