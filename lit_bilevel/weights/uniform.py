"""Uniform weights: w_i = 1. The baseline that learns nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.base import ExampleWeights


class UniformWeights(ExampleWeights):
    """Every row counts the same."""

    learnable = False

    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        """Nothing to make."""

    def weigh(self, features: Features) -> Tensor:
        return torch.ones_like(features.row_B, dtype=torch.float32)

    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        raise UserError("`UniformWeights` cannot be learned; choose another `model.weights`, or the `Mixing` solver.")

    def set_prior(self, weight_N: Tensor) -> None:
        raise UserError("`UniformWeights` are equal; for fixed weights use `SigmoidWeights` with the `Mixing` solver.")

    def table(self) -> Tensor:
        return torch.ones(self.pool_rows, dtype=torch.float64, device=self.visits.device)

    def statistics(self) -> dict[str, Tensor]:
        rows = torch.full((), float(self.pool_rows), dtype=torch.float64, device=self.visits.device)
        return {"effective_size": rows, "entropy": rows.log()}
