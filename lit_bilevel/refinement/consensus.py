"""Response weights by agreement, and products of rules.

    Agreement    r = c / mean c        c: share of the other G − 1 answers to the question that say the same
    Product      r = Π_k r_k

The mean is that of all responses of a round that are trained on, so r has mean 1 over them, and a question whose
answers scatter counts less than one whose answers agree. With mean 1 inside each question, two answers would always
count the same: either both agree or neither does. Source: self-consistency (arXiv 2203.11171).

Left out: powers of c; `Agreed` already says from where on it is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import BilevelProblem, Values
from lit_bilevel.refinement.response_weights import Ratios, ResponseWeights


class Agreement(ResponseWeights):
    """r ∝ the share of the other answers to the question that say the same, mean 1 over the responses of a round."""

    needs_agreement = True

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        assert ratios.agreement_R is not None
        weight_J = ratios.agreement_R.to(ratios.log_ratio_J.dtype)[ratios.response_J]
        return weight_J, torch.zeros_like(weight_J, dtype=torch.bool)


class Product(ResponseWeights):
    """The product of several rules, token by token: r = Π_k r_k.

    Args:
        rules: at least two; those that have mean 1 inside a group or over a round keep it by themselves only.
    """

    def __init__(self, rules: list[ResponseWeights]):
        if len(rules) < 2:
            raise UserError(f"`Product` has {len(rules)} `rules`; give two or more, or the one by itself.")
        self.rules = rules
        self.needs_alignment = any(rule.needs_alignment for rule in rules)
        self.needs_agreement = any(rule.needs_agreement for rule in rules)

    def weigh(self, ratios: Ratios) -> tuple[Tensor, Tensor]:
        parts = [rule.weigh(ratios) for rule in self.rules]
        weights, clipped = (torch.stack(part) for part in zip(*parts, strict=True))
        return weights.prod(0), clipped.any(0)

    def direction(self, problem: BilevelProblem) -> Values:
        # the first one's: a step makes one pass, along one direction
        rule = next(rule for rule in self.rules if rule.needs_alignment)
        return rule.direction(problem)

    def singles(self, ratios: Ratios) -> Tensor:
        return torch.cat([rule.singles(ratios) for rule in self.rules])

    def follow(self, sums: Tensor) -> None:
        start = 0  # the rules' numbers come one after the other, as `singles` puts them
        for rule in self.rules:
            rule.follow(sums[start : start + rule.counted])
            start += rule.counted

    @property
    def counted(self) -> int:
        return sum(rule.counted for rule in self.rules)

    def state_dict(self) -> dict[str, Any]:
        return {f"{k}.{name}": v for k, rule in enumerate(self.rules) for name, v in rule.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, rule in enumerate(self.rules):
            own = {name.removeprefix(f"{number}."): v for name, v in state.items() if name.startswith(f"{number}.")}
            rule.load_state_dict(own)
