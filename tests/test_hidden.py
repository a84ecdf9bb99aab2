"""The last hidden state of a row as numbers, and the ratio that is told from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import ranks
from support.scoring import policy_of, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel.data.collate import collate
from lit_bilevel.scores import hidden
from lit_bilevel.scores.columns import FEATURES
from lit_bilevel.scores.combination import combine
from lit_bilevel.scores.density import HIDDEN, density_ratios
from lit_bilevel.scores.measure import Measure
from lit_bilevel.scores.opening import opening_of
from lit_bilevel.scores.sweep import ScoredRows, score_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return folder


def measured(policy, tokenizer, table, batch_size):
    rows = ScoredRows(table)
    measure = Measure(policy, opening_of(tokenizer), tokenizer.eos_token_id, batch_size)
    return measure(*rows(list(range(len(rows)))))[:, len(FEATURES) :]


def test_the_state_before_the_last_token_is_kept(model, small):
    """Against the model's own states, a row at a time, whatever the batch is."""
    data, tokenizer = rows_of(model, small), AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    found = measured(policy_of(model), tokenizer, data.sets["pool"], 7)
    assert found.shape == (90, hidden.NUMBERS)
    width = plain.config.hidden_size
    for row in range(0, 90, 9):
        ids = torch.tensor([data.sets["pool"][row]["input_ids"]])
        with torch.no_grad():
            state = plain.base_model(ids).last_hidden_state[0, -2].numpy()
        np.testing.assert_allclose(found[row, :width], state, rtol=1e-4, atol=1e-5)
        assert not found[row, width:].any()  # a state this small stays as it is


def test_wide_states_keep_their_distances_under_one_projection():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(20, 2000, generator=random)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    projected = hidden.last_states(states, torch.arange(20))
    assert torch.equal(torch.get_rng_state(), before)
    assert projected.shape == (20, hidden.NUMBERS)
    hidden._matrix.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(hidden.last_states(states, torch.arange(20)), projected)
    ratio = torch.pdist(projected) / torch.pdist(states)
    assert 0.8 < ratio.min() < ratio.max() < 1.2


@pytest.mark.parametrize("width", [8, 2000])
def test_the_projection_is_the_same_in_double_precision(width):
    states = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    hidden._matrix.cache_clear()
    single = hidden.last_states(states, torch.arange(3))
    hidden._matrix.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as Lightning's 64-true does while it runs a step
    try:
        assert torch.equal(hidden.last_states(states.double(), torch.arange(3)), single)
    finally:
        torch.set_default_dtype(default)


def test_the_ratio_tells_rows_apart_that_differ_in_one_direction():
    random = np.random.default_rng(0)
    pool, trusted = random.normal(size=(400, 16)), random.normal(size=(200, 16))
    good = np.arange(400) < 200
    pool[good, 3] += 3
    trusted[:, 3] += 3
    found = density_ratios(pool, trusted, HIDDEN)[: len(pool)]
    assert found.mean() == pytest.approx(1)
    assert (found[good][:, None] > found[~good]).mean() > 0.95


def test_a_policy_that_shows_no_states_has_no_such_ratio(model, small):
    """Its output layer is not known, so logits are all that it gives."""
    data, tokenizer, policy = rows_of(model, small), AutoTokenizer.from_pretrained(model), policy_of(model)
    policy.head_shape = None
    found, _ = score_rows(policy, tokenizer, data.sets["pool"], data.sets["upper"])
    assert np.isnan(found["hidden_ratio"]).all()
    assert np.isfinite(found["density_ratio"]).all()
    combined = combine(found, ["ifd", "density_ratio"])  # the others decide
    np.testing.assert_allclose(found["combined"], combined, rtol=1e-5)
    batch = collate([ScoredRows(data.sets["pool"])([0])[0][0]], 1)
    assert policy.predictions(batch).hidden_KD is None
