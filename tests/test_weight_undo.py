"""A step of the weights that is taken back, with its optimizer, leaves no trace and copies no table."""

from __future__ import annotations

import pytest
import torch
from support.problems import WEIGHT_OPTIMIZERS, WEIGHTINGS, normal
from support.visiting import BATCH, GROUPS, ROWS, accepted, built, features_of

from lit_bilevel.weights.undo import Undo


@pytest.mark.parametrize(("name", "optimizer"), [*accepted(), ("bmo", None), ("uniform", None)])
@pytest.mark.parametrize("earlier", [0, 3])
def test_a_step_that_is_taken_back_leaves_no_trace(name, optimizer, earlier):
    """Weights, averages and the optimizer's state are those of a run that never took it, and so is what follows."""
    pairs = []
    for skipped in (False, True):
        weights = built(name)
        stepped = WEIGHT_OPTIMIZERS[optimizer](weights.parameters()) if optimizer else None
        for step in range(earlier + 4):
            rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:BATCH]
            rows = torch.cat([rows, rows[:2]])  # a window may hold a row twice
            features = features_of(rows, GROUPS + step)
            if step == earlier and not skipped:
                continue
            undo = Undo(weights, stepped, rows)
            weights.observe(features)
            if stepped is not None:
                weights.set_gradient(features, normal(len(rows), seed=step))
                stepped.step()
                stepped.zero_grad()
                weights.after_step()
            if step == earlier:
                assert int(weights.visits.sum()) == (earlier + 1) * len(rows)
                undo.take_back()
                assert int(weights.visits.sum()) == earlier * len(rows)
        pairs.append((weights.state_dict(), stepped.state_dict() if stepped else {}))
    (weights, state), (again, state_again) = pairs
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
    torch.testing.assert_close(state_again, state, rtol=0, atol=0)


def test_taking_back_a_step_copies_no_table():
    """O(batch) at any N: what is copied whole has a few numbers."""
    for name in WEIGHTINGS:
        weights = built(name)
        if name == "network":
            weights.network = weights.source_embedding = torch.nn.Identity()  # large, and of a size of its own
        copies = Undo(weights, None, torch.arange(2))._copies
        assert sum(copy.values.numel() for copy in copies.values()) < 20, name
