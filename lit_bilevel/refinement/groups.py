"""Weighs the groups of refined rows during training, and joins their weights with the offline ones.

    a refined row contributes   κ·w_i·ℓ_i + (1−κ)·w̃_i·ℓ̃_i        w̃ mean 1 over the refined rows, 1 as a round begins

w̃ is a second set of weights: in closed form (`BMOWeights`: e^{−ℓ̃/τ} over its running mean), or learned by a copy of
the weight optimizer. The refined rows' offline weights take no more steps, and stay in the pool's normaliser: those of
a table are frozen, while weights that rows share or that follow from losses (`SourceWeights`, `NetworkWeights`,
`BMOWeights`) move on with what they follow from. In a batch, an
offline example of pool row i has row number i < N, the group at position m of the refined rows has N + m, so both pass
through one batched step.

Source: arXiv 2511.21056. Left out: a learned κ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_bilevel.refinement.response_weights import ResponseWeights
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.types import PADDING_ROW, Features
from lit_bilevel.weights.base import ExampleWeights
from lit_bilevel.weights.optimizer import check_optimizer
from lit_bilevel.weights.undo import Undo


class Refinement(nn.Module):
    """Joins the offline weights with those of the groups; empty until the first round.

    Args:
        template: weights of the groups that were not built yet, copied for each round.
        rule: how responses count inside their group.
        make_optimizer: makes the optimizer of the groups' weights.
    """

    def __init__(self, template: ExampleWeights, rule: ResponseWeights, make_optimizer: Callable[..., Optimizer]):
        super().__init__()
        self._template = (copy.deepcopy(template),)  # in a tuple, so that it is no submodule
        self.rule = rule
        self.make_optimizer = make_optimizer
        self.weights: ExampleWeights | None = None
        self.optimizer: Optimizer | None = None
        self.offline_share = 0.0
        self.register_buffer("rows", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("frozen", torch.zeros(0, dtype=torch.bool), persistent=False)
        self._source = torch.zeros(0, dtype=torch.int64)
        self._optimizer_state: dict[str, Any] | None = None
        self._undos: list[Undo] = []

    rows: Tensor
    frozen: Tensor

    @property
    def template(self) -> ExampleWeights:
        """Weights of the groups before any round."""
        return self._template[0]

    def check(self) -> None:
        """Refuse, before any round, an optimizer that is not safe for the groups' weights.

        Raises:
            UserError: as `check_optimizer` does.
        """
        if self.template.learnable:
            groups = copy.deepcopy(self.template)
            groups.build(torch.arange(2))  # two rows of two sources, which is enough for any weighting
            check_optimizer(groups, self.make_optimizer(list(groups.parameters())))

    @property
    def active(self) -> bool:
        """Whether any row is refined."""
        return self.weights is not None

    @property
    def needs_loss(self) -> bool:
        """Whether the groups' weights depend on their losses in this step."""
        return self.weights is not None and self.weights.needs_loss

    def begin(self) -> None:
        """Forget the rows that an earlier run refined."""
        none = torch.zeros(0, dtype=torch.int64)
        self._build(none, none, 0, 0.0, torch.float32)

    def begin_round(self, rows_M: Tensor, offline: ExampleWeights, source_N: Tensor, offline_share: float) -> None:
        """Start a round: these pool rows are refined, and every group weighs 1.

        Args:
            rows_M: the refined rows, sorted.
            offline: the weights of the pool.
            source_N: source number of every pool row.
            offline_share: κ.
        """
        self._build(rows_M, source_N[rows_M], offline.pool_rows, offline_share, offline.dtype)
        self.to(offline.visits.device)

    def _build(
        self, rows_M: Tensor, source_M: Tensor, pool_rows: int, offline_share: float, dtype: torch.dtype
    ) -> None:
        # nothing is taken over from the round before: what was learned there is of answers that are gone
        self.weights = self.optimizer = self._optimizer_state = None
        self.rows, self._source, self.offline_share = rows_M, source_M, offline_share
        self.frozen = torch.zeros(pool_rows, dtype=torch.bool)
        self.frozen[rows_M] = True
        if len(rows_M):
            self.weights = copy.deepcopy(self.template)
            self.weights.build(source_M, dtype)

    def weigh(self, offline: ExampleWeights, features: Features) -> Tensor:
        """[B] weights of offline examples and groups alike, each with its share; 0 for padding."""
        if self.weights is None:
            return offline(features)
        group_B = features.row_B >= len(self.frozen)
        own = replace(features, row_B=features.row_B.masked_fill(group_B, PADDING_ROW))
        weight_B = offline(own)
        frozen_B = self.frozen[own.row_B.clamp_min(0)]
        weight_B = torch.where(frozen_B, self.offline_share * weight_B, weight_B)
        position_B = torch.where(group_B, features.row_B - len(self.frozen), PADDING_ROW)
        source_B = features.source_B.masked_fill(~group_B, 0)  # the groups need not have every source of the pool
        groups = replace(features, row_B=position_B, source_B=source_B)
        # every example has a place in one of the two and is padding in the other, where it weighs 0
        return weight_B + (1 - self.offline_share) * self.weights(groups)

    def observe(self, offline: ExampleWeights, optimizer: Optimizer | None, features: Features) -> None:
        """Take note of a policy step, before its weight step: its rows and groups, without padding."""
        own, groups = self._part(features)
        self._undos = [Undo(offline, optimizer, features.row_B[own])]
        if self.weights is not None:
            if self.optimizer is None:  # made here, where the weights are on the device for certain
                self._make_optimizer(self.weights)
            self._undos.append(Undo(self.weights, self.optimizer, features.row_B[groups] - len(self.frozen)))
        if len(own):
            offline.observe(_select(features, own))
        if self.weights is not None and len(groups):
            self.weights.observe(_select(features, groups, len(self.frozen)))

    def step(self, offline: ExampleWeights, optimizer: Optimizer | None, features: Features, s_B: Tensor) -> None:
        """One step of both tables from the scores of the global batch, without padding; frozen rows stay."""
        if self.weights is None:
            _step(offline, optimizer, features, s_B)
            return
        own, groups = self._part(features)
        # a refined row's own pair is no longer what is trained on; its weight stays what chose it, for `select` and for
        # the next round
        own = own[~self.frozen[features.row_B[own]]]
        parts = ((offline, optimizer, own, 0), (self.weights, self.optimizer, groups, len(self.frozen)))
        for weights, stepped, chosen, first in parts:
            if weights.learnable and len(chosen) > 1:  # one row has no baseline to be compared with
                _step(weights, stepped, _select(features, chosen, first), s_B[chosen])

    def follow(self, tally: ResponseTally | None) -> None:
        """Let the rule take in the generated responses of a policy step that was taken.

        Args:
            tally: of all processes, if there were any responses.
        """
        if tally is not None:
            self.rule.follow(tally.singles)

    def take_back(self) -> None:
        """Leave no trace in the weights of the step that was last observed, because the policy's was skipped."""
        for undo in self._undos:
            undo.take_back()

    def table(self) -> tuple[Tensor, Tensor]:
        """The refined rows [M], and the weights [M] of their groups."""
        if self.weights is None:
            return self.rows, self.rows.double()
        return self.rows, self.weights.table()

    def _part(self, features: Features) -> tuple[Tensor, Tensor]:
        """Indices of the offline examples and of the groups."""
        if self.weights is None:
            return torch.arange(len(features.row_B), device=features.row_B.device), self.rows[:0]
        group_B = features.row_B >= len(self.frozen)
        return (~group_B).nonzero()[:, 0], group_B.nonzero()[:, 0]

    def _make_optimizer(self, weights: ExampleWeights) -> None:
        parameters = list(weights.parameters())
        if parameters:
            self.optimizer = self.make_optimizer(parameters)
            if self._optimizer_state is not None:
                self.optimizer.load_state_dict(self._optimizer_state)
        self._optimizer_state = None

    def checkpoint(self) -> dict[str, Any]:
        """What `state_dict` does not hold: which rows, and the state of the optimizer and of the rule."""
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else self._optimizer_state
        return {
            "rows": self.rows.cpu(),
            "source": self._source.cpu(),
            "share": self.offline_share,
            "double": self.weights is not None and self.weights.dtype == torch.float64,
            "optimizer": optimizer,
            "rule": self.rule.state_dict(),
        }

    def restore(self, state: dict[str, Any], pool_rows: int) -> None:
        """Take the shape that a checkpoint was written with, so that its `state_dict` fits."""
        dtype = torch.float64 if state["double"] else torch.float32
        device = self.rows.device
        self._build(state["rows"], state["source"], pool_rows, state["share"], dtype)
        self.to(device)
        self._optimizer_state = state["optimizer"]
        self.rule.load_state_dict(state["rule"])


def _select(features: Features, chosen: Tensor, first: int = 0) -> Features:
    """Some of the examples, their rows counted from `first`."""
    loss_B = features.loss_B
    return Features(
        features.row_B[chosen] - first,
        features.source_B[chosen],
        features.length_B[chosen],
        None if loss_B is None else loss_B[chosen],
    )


def _step(weights: ExampleWeights, optimizer: Optimizer | None, features: Features, s_B: Tensor) -> None:
    weights.set_gradient(features, s_B)
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    weights.after_step()
