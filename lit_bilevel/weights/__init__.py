"""Weightings: features of rows in, data weights out."""

from lit_bilevel.weights.base import ExampleWeights, TableWeights
from lit_bilevel.weights.sigmoid import SigmoidWeights
from lit_bilevel.weights.softmax import SoftmaxWeights
from lit_bilevel.weights.uniform import UniformWeights

__all__ = ["ExampleWeights", "SigmoidWeights", "SoftmaxWeights", "TableWeights", "UniformWeights"]
