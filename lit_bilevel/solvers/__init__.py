"""Solvers: a bilevel problem in, one score per example out."""

from lit_bilevel.solvers.base import BilevelSolver
from lit_bilevel.solvers.cross_fit import CrossFit
from lit_bilevel.solvers.implicit import Implicit
from lit_bilevel.solvers.mixing import Mixing
from lit_bilevel.solvers.one_step import OneStep
from lit_bilevel.solvers.penalty import Penalty
from lit_bilevel.solvers.value_function import ValueFunction

__all__ = ["BilevelSolver", "CrossFit", "Implicit", "Mixing", "OneStep", "Penalty", "ValueFunction"]
