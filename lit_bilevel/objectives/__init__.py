"""Objectives: what either level minimises, from the NLL of predicted tokens to one loss per example."""

from lit_bilevel.objectives.base import Objective
from lit_bilevel.objectives.dpo import DPO
from lit_bilevel.objectives.sft import SFT

__all__ = ["DPO", "SFT", "Objective"]
