"""Filters: the rows of a pool that are kept before a policy is trained on them."""

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.bounds import CleanRows, RandomRows
from lit_bilevel.comparison.filters.gradients import GradientSimilarity
from lit_bilevel.comparison.filters.learned import LearnedWeights
from lit_bilevel.comparison.filters.losses import HighestLoss, LowestLoss, PerplexityDifference
from lit_bilevel.comparison.filters.ngrams import NgramImportance
from lit_bilevel.comparison.filters.scores import PassScore

__all__ = [
    "CleanRows",
    "Filter",
    "GradientSimilarity",
    "HighestLoss",
    "LearnedWeights",
    "LowestLoss",
    "NgramImportance",
    "PassScore",
    "PerplexityDifference",
    "RandomRows",
]
