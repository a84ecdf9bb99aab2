"""Weights of 64 rows that are visited in windows of 8, as training visits them."""

from __future__ import annotations

import itertools

import torch

from lit_bilevel import ExampleWeights
from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.optimizer import check_optimizer
from support.problems import WEIGHT_OPTIMIZERS, WEIGHTINGS

ROWS, BATCH = 64, 8

LEARNED = [name for name, make in WEIGHTINGS.items() if make().learnable]

RUNNING = [name for name, make in WEIGHTINGS.items() if make().needs_scoring]


def built(name: str, dtype=torch.float64) -> ExampleWeights:
    weights = WEIGHTINGS[name]()
    weights.build(torch.arange(ROWS) % 2, dtype)
    return weights


def accepted() -> list[tuple[str, str]]:
    """All pairs of weighting and optimizer that a run may combine; settings of a class with the default one alone."""
    pairs = []
    for name, optimizer in itertools.product(LEARNED, WEIGHT_OPTIMIZERS):
        if "+" in name and optimizer != "exponentiated_gradient":
            continue
        weights = built(name)
        try:
            check_optimizer(weights, WEIGHT_OPTIMIZERS[optimizer](weights.parameters()))
            pairs.append((name, optimizer))
        except UserError:
            pass
    return pairs


def features_of(rows, loss_N):
    return Features(rows, rows % 2, 5 + rows % 7, loss_N[rows])


def visit(weights, optimizer, epochs, score, loss_N, seed=0, check=lambda: None, order=None):
    """Visit all rows once an epoch in random batches; `score(step, rows)` gives s."""
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(ROWS, generator=generator).split(BATCH):
            rows = batch if order is None else order[batch]
            features = features_of(rows, loss_N) if order is None else features_of_permuted(batch, order, loss_N)
            weights.observe(features)
            if optimizer is not None:
                weights.set_gradient(features, score(step, batch))
                optimizer.step()
                optimizer.zero_grad()
                weights.after_step()
            step += 1
            check()
        weights.recount()
    if weights.needs_scoring:
        rows = torch.arange(ROWS)
        weights.score(features_of(rows, loss_N) if order is None else features_of_permuted(rows, order, loss_N))
    with torch.no_grad():
        return weights.table()


def features_of_permuted(batch, order, loss_N):
    """What `features_of` gives for `batch`, with each row stored at another place of the pool."""
    return Features(order[batch], batch % 2, 5 + batch % 7, loss_N[batch])


def spread(table) -> float:
    return float(table.max() - table.min())


EQUAL = torch.full((ROWS,), 2.0, dtype=torch.float64)

GROUPS = 1.0 + (torch.arange(ROWS) % 2).double()
