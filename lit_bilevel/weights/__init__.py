"""Weightings: features of rows in, data weights out."""

from lit_bilevel.weights.base import ExampleWeights
from lit_bilevel.weights.bmo import BMOWeights
from lit_bilevel.weights.network import NetworkWeights
from lit_bilevel.weights.running import RunningWeights
from lit_bilevel.weights.sigmoid import SigmoidWeights
from lit_bilevel.weights.softmax import SoftmaxWeights
from lit_bilevel.weights.source import SourceWeights
from lit_bilevel.weights.table import TableWeights
from lit_bilevel.weights.uniform import UniformWeights

__all__ = [
    "BMOWeights",
    "ExampleWeights",
    "NetworkWeights",
    "RunningWeights",
    "SigmoidWeights",
    "SoftmaxWeights",
    "SourceWeights",
    "TableWeights",
    "UniformWeights",
]
