"""The callbacks of a run, one in each file."""

from lit_bilevel.callbacks.card import ModelCard
from lit_bilevel.callbacks.checkpoint import BilevelCheckpoint
from lit_bilevel.callbacks.clean_probability import CleanProbability
from lit_bilevel.callbacks.closing_sweep import ClosingSweep
from lit_bilevel.callbacks.export import Export
from lit_bilevel.callbacks.figures import Figures
from lit_bilevel.callbacks.inspector import WeightInspector
from lit_bilevel.callbacks.phase_end import AtPhaseEnd
from lit_bilevel.callbacks.predict import Predictions
from lit_bilevel.callbacks.random_state import RandomState
from lit_bilevel.callbacks.refine import SelfRefine
from lit_bilevel.callbacks.scored_prior import ScoredPrior
from lit_bilevel.callbacks.second_look import SecondLook
from lit_bilevel.callbacks.summary import Summary
from lit_bilevel.callbacks.warm_start import WarmStart
from lit_bilevel.refinement.choose import BelowThreshold, BelowTypical, LowestFraction, RandomFraction, RowChooser

__all__ = [
    "AtPhaseEnd",
    "BelowThreshold",
    "BelowTypical",
    "BilevelCheckpoint",
    "CleanProbability",
    "ClosingSweep",
    "Export",
    "Figures",
    "LowestFraction",
    "ModelCard",
    "Predictions",
    "RandomFraction",
    "RandomState",
    "RowChooser",
    "ScoredPrior",
    "SecondLook",
    "SelfRefine",
    "Summary",
    "WarmStart",
    "WeightInspector",
]
