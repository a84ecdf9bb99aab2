"""The scoring pass: every number against a plain forward pass of each row alone."""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import ranks
from support.files import TOY, read_jsonl, write_jsonl
from support.scoring import policy_of, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel.data.encode import Encoder
from lit_bilevel.scores.columns import COLUMNS, FEATURES
from lit_bilevel.scores.opening import opening_of
from lit_bilevel.scores.sweep import score_rows
from lit_bilevel.scores.table import Scores

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    ranks.save_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def loaded(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


def plainly(model: Path, tokenizer, opening: list[int], example, text: str) -> dict[str, float]:
    """Every number of a row from transformers, `F.cross_entropy` and `Categorical` alone."""
    lm = loaded(model)

    def losses(before: list[int], response: list[int]):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([before + response])).logits[0, len(before) - 1 : -1]
        nll = F.cross_entropy(logits, torch.tensor(response), reduction="none")
        return nll, torch.distributions.Categorical(logits=logits).entropy()

    start = example["response_start"]
    prompt, response = example["input_ids"][:start], example["input_ids"][start:]
    nll, entropy = losses(prompt, response)
    alone, _ = losses(opening, response)
    ended = response[-1] == tokenizer.eos_token_id
    return {
        "loss": float(nll.mean()),
        "loss_without_prompt": float(alone.mean()),
        "pmi": float(alone.mean() - nll.mean()),
        "ifd": float(nll.mean() / alone.mean()),
        "end_loss": float(nll[-1]) if ended else math.nan,
        "entropy": float(entropy.mean()),
        "length": len(response),
        "compressed": len(zlib.compress(text.encode(), 9)) / len(text.encode()),
        "loss_before_end": float(nll[:-1].mean() if ended else nll.mean()),
        "loss_before_end_without_prompt": float(alone[:-1].mean() if ended else alone.mean()),
        "first_loss": float(nll[:3].mean()),
        "largest_loss": float(nll.max()),
        "prompt_length": len(prompt),
    }


@pytest.mark.parametrize("templated", [False, True])
def test_every_number_is_that_of_a_plain_pass(model, chat_model, small, templated):
    folder = chat_model if templated else model
    data, tokenizer = rows_of(folder, small, max_length=32 if templated else 18), AutoTokenizer.from_pretrained(folder)
    opening = opening_of(tokenizer)
    assert tokenizer.decode(opening).endswith("assistant " if templated else tokenizer.bos_token or tokenizer.eos_token)
    found, _ = score_rows(policy_of(folder), tokenizer, data.sets["pool"], data.sets["upper"], batch_size=7)
    assert list(found)[: len(COLUMNS)] == list(COLUMNS)
    assert np.isnan(found["end_loss"]).any()  # some are cut
    for row in range(0, 90, 9):
        example = data.sets["pool"][row]
        for name, value in plainly(folder, tokenizer, opening, example, example["response"]).items():
            assert found[name][row] == pytest.approx(value, rel=2e-6, abs=2e-6, nan_ok=True), (row, name)


def test_a_row_is_scored_alike_in_any_batch(model, small):
    data, tokenizer = rows_of(model, small), AutoTokenizer.from_pretrained(model)
    found = [
        score_rows(policy_of(model), tokenizer, data.sets["pool"], None, batch_size, call_cost)[0]
        for batch_size, call_cost in ((1, math.inf), (5, math.inf), (64, 8.0))
    ]
    for name in FEATURES:
        for other in found[1:]:
            np.testing.assert_allclose(found[0][name], other[name], rtol=1e-6, err_msg=name)
    assert np.isnan(found[0]["density_ratio"]).all()  # nothing to compare with


def test_all_turns_or_the_last_are_learned_and_the_last_is_scored(model, tmp_path):
    turns = [("user", "add: 1+1"), ("assistant", "10"), ("user", "copy: abc"), ("assistant", "abc")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    other = [{"prompt": f"copy: {'a' * n}", "response": "a" * n} for n in range(1, 5)]
    small = {
        "pool": write_jsonl(tmp_path / "pool.jsonl", [messages]),
        "validation": write_jsonl(tmp_path / "validation.jsonl", other),
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    last, every = (
        score_rows(policy_of(model), tokenizer, rows_of(model, small, train_on=which).sets["pool"])[0]
        for which in ("last", "all")
    )
    assert last["length"].tolist() == [4]
    for name in FEATURES:
        np.testing.assert_array_equal(last[name], every[name], err_msg=name)


def test_plain_text_has_no_prompt_to_take_away(model, tmp_path):
    texts = [{"text": row["prompt"] + row["response"]} for row in read_jsonl(TOY / "pool.jsonl")[:40]]
    small = {
        "pool": write_jsonl(tmp_path / "pool.jsonl", texts[:20]),
        "validation": write_jsonl(tmp_path / "validation.jsonl", texts[20:]),
    }
    data = rows_of(model, small)
    found, _ = score_rows(policy_of(model), AutoTokenizer.from_pretrained(model), data.sets["pool"], data.sets["upper"])
    for name in ("loss_without_prompt", "pmi", "ifd"):
        assert np.isnan(found[name]).all()
    assert found["density_ratio"].mean() == pytest.approx(1)
    assert np.isfinite(found["loss"]).all()
    with pytest.raises(ValueError, match="20 of 20 rows have no `ifd`, because they have no prompt"):
        Scores([], found).orient("ifd")
    alone, _ = score_rows(policy_of(model), AutoTokenizer.from_pretrained(model), data.sets["pool"])
    with pytest.raises(
        ValueError, match="20 of 20 rows have no `combined`, because ifd, density_ratio, hidden_ratio tell"
    ):
        Scores([], alone).orient("combined")


def test_the_opening_of_templates():
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    assert opening_of(tokenizer) == [tokenizer.bos_token_id or tokenizer.eos_token_id]
    tokenizer.chat_template = TEMPLATE
    opening = opening_of(tokenizer)
    assert tokenizer.decode(opening).endswith("\nassistant ")
    assert Encoder(tokenizer, 99).prompts(["x"])[0][-len(opening) + 1 :] == opening[1:]


def test_a_policy_in_training_is_left_as_it_is(model, small):
    data, policy = rows_of(model, small), policy_of(model)
    policy.train()
    before = [parameter.clone() for parameter in policy.parameters()]
    score_rows(policy, AutoTokenizer.from_pretrained(model), data.sets["upper"])
    assert policy.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_is_refused(model, small):
    data, policy = rows_of(model, small), policy_of(model)
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="loss of 24 rows is not finite"):
        score_rows(policy, AutoTokenizer.from_pretrained(model), data.sets["upper"])


def test_entropy_is_chunked_and_exact(monkeypatch):
    from lit_bilevel import losses

    torch.manual_seed(0)
    layer = losses.OutputLayer(torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
    hidden, target = torch.randn(33, 8, dtype=torch.float64), torch.randint(50, (33,))
    logits = layer.logits(hidden)
    largest = []
    original = losses.logits_nll_and_entropy
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * 50 * 10)
    monkeypatch.setattr(losses, "logits_nll_and_entropy", lambda z, t: largest.append(len(z)) or original(z, t))
    nll, entropy = losses.token_nll_and_entropy(hidden, layer, target)
    assert max(largest) == 10
    torch.testing.assert_close(nll, F.cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    masked = logits.clone()
    masked[:, 7] = -math.inf
    target[target == 7] = 8
    assert original(masked, target)[1].isfinite().all()
