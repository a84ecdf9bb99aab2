"""Solvers: a bilevel problem in, one score per example out."""

from lit_bilevel.solvers.base import BilevelSolver
from lit_bilevel.solvers.mixing import Mixing
from lit_bilevel.solvers.one_step import OneStep
from lit_bilevel.solvers.penalty import Penalty

__all__ = ["BilevelSolver", "Mixing", "OneStep", "Penalty"]
