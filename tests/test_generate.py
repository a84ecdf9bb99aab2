"""Generation: batches change nothing, ids are kept as drawn, and training is left as it was."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from support.generating import CONFIGS, ENDS, ask, make

from lit_bilevel.errors import UserError
from lit_bilevel.generation import respond as generation
from lit_bilevel.generation.backends import VLLM, ContinuousBatching
from lit_bilevel.generation.base import Sample, Sampling, batches_by_length, cut_at_end
from lit_bilevel.generation.ending import end_tokens
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.generation.respond import score
from lit_bilevel.generation.sampling import draw
from lit_bilevel.policy.policy import Policy


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_greedy_is_one_by_one_and_the_librarys_own(name):
    policy, requests = make(name), ask()
    greedy = Sampling(12, temperature=0)
    together = HFGenerate().generate(policy, requests, greedy, ENDS)
    alone = [HFGenerate().generate(policy, [request], greedy, ENDS)[0] for request in requests]
    assert together == alone
    assert {sample.finished for sample in together} == {True, False}  # else no row leaves the batch before another
    policy.eval()
    for request, sample in zip(requests[:3], together, strict=False):
        prompt = torch.tensor([request.prompt_ids])
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": ENDS, "pad_token_id": 0}
        expected = policy.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert sample.token_ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7, 8), Sampling(12, 1.3, 0, 0.8)])
def test_samples_do_not_depend_on_batches(name, sampling):
    policy, requests = make(name), ask()
    reference = HFGenerate().generate(policy, requests, sampling, ENDS)
    assert HFGenerate(60).generate(policy, requests, sampling, ENDS) == reference
    assert HFGenerate().generate(policy, requests[::-1], sampling, ENDS) == reference[::-1]
    other = HFGenerate().generate(policy, ask(round=1), sampling, ENDS)
    assert other != reference


@pytest.mark.parametrize("name", CONFIGS)
def test_a_question_is_read_once_for_all_its_answers(name):
    """Copied keys and values give the answers that each request has alone."""
    policy = make(name)
    requests = [
        replace(request, stream=(0, 0, place, sample)) for place, request in enumerate(ask()) for sample in range(3)
    ]
    alone = [HFGenerate().generate(policy, [request], Sampling(12), ENDS)[0] for request in requests]
    read: list[tuple[int, ...]] = []
    hook = policy.causal_lm.register_forward_pre_hook(
        lambda model, arguments, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    together = HFGenerate().generate(policy, requests[::-1], Sampling(12), ENDS)
    hook.remove()
    assert together == alone[::-1]
    assert [rows for rows, width in read if width > 1] == [8]  # of 24 requests
    assert len({tuple(sample.token_ids) for sample in alone}) > 8


@pytest.mark.parametrize("name", CONFIGS)
def test_the_responses_hold_no_prompt_token_and_keep_their_end(name):
    """Under left padding the public code sliced at the prompt's own length, and prompts leaked into responses."""
    policy, requests = make(name), ask()
    samples = HFGenerate().generate(policy, requests, Sampling(12), ENDS)
    for request, sample in zip(requests, samples, strict=True):
        assert sample.finished == (sample.token_ids[-1] in ENDS)
        assert not set(sample.token_ids[:-1]) & set(ENDS)
        assert len(sample.token_ids) <= request.max_new_tokens
    assert all(len(sample.token_ids) == 12 for sample in samples if not sample.finished)  # nothing was added


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_scores_are_the_models_log_probabilities(name, temperature, cut):
    """Not shifted, at the sampling temperature, over the full vocabulary, the end token included."""
    policy, requests = make(name), ask()
    samples = HFGenerate().generate(policy, requests, Sampling(12, temperature, **cut), ENDS)
    responses = score(policy, requests, samples, temperature, torch.device("cpu"))
    policy.eval()
    for request, sample, response in zip(requests, samples, responses, strict=True):
        ids = torch.tensor([request.prompt_ids + sample.token_ids])
        with torch.no_grad():
            logprobs = (policy.model(ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
        start = len(request.prompt_ids)
        expected = [logprobs[start + t - 1, token].item() for t, token in enumerate(sample.token_ids)]
        assert response.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert response.token_ids == sample.token_ids


def test_scoring_goes_through_some_rows_at_a_time(monkeypatch):
    policy, requests = make("llama"), ask()
    samples = HFGenerate().generate(policy, requests, Sampling(12), ENDS)
    whole = score(policy, requests, samples, 1.0, torch.device("cpu"))
    passes = []
    scored = generation.response_logprobs
    monkeypatch.setattr(generation, "response_logprobs", lambda *given: passes.append(1) or scored(*given))
    monkeypatch.setattr(generation, "SCORED_TOKENS", 1)  # which no row fits into, so each has a pass of its own
    parts = score(policy, requests, samples, 1.0, torch.device("cpu"))
    assert len(passes) == len(requests) > 2
    for one, other in zip(whole, parts, strict=True):
        assert one.token_ids == other.token_ids
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
    passes.clear()
    some = [replace(request, scored=place % 2 == 0) for place, request in enumerate(requests)]
    found = score(policy, some, samples, 1.0, torch.device("cpu"))
    assert len(passes) == len(requests[::2])
    for request, one, other in zip(some, parts, found, strict=True):
        assert other == (one if request.scored else replace(one, token_logprobs=[]))
    passes.clear()
    twice = score(policy, [*requests, *some], [*samples, *samples], 1.0, torch.device("cpu"))
    assert len(passes) == len(requests)  # equal answers to one question have one pass
    assert twice == [*parts, *found]
    other = score(policy, requests[:2], [samples[0]] * 2, 1.0, torch.device("cpu"))  # equal answers to two are not
    assert other == [score(policy, [request], [samples[0]], 1.0, torch.device("cpu"))[0] for request in requests[:2]]


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fails", [False, True])
def test_training_is_left_as_it_was(name, fails):
    policy = make(name)
    policy.causal_lm.get_decoder().eval()  # a mixed state must come back too
    before = [module.training for module in policy.modules()]
    random, use_cache = torch.get_rng_state(), policy.causal_lm.config.use_cache

    def progress(tokens: int) -> None:
        if fails:
            raise Broken

    if fails:
        with pytest.raises(Broken):
            HFGenerate().generate(policy, ask(), Sampling(12), ENDS, progress)
    else:
        HFGenerate().generate(policy, ask(), Sampling(12), ENDS, progress)
    assert [module.training for module in policy.modules()] == before
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.causal_lm.config.use_cache == use_cache
    assert torch.is_grad_enabled()
    policy.model(torch.tensor([[11, 12, 13]])).logits.sum().backward()  # no inference tensor was left behind


def test_generation_is_right_under_activation_checkpointing():
    plain, checkpointed = make("llama"), make("llama")
    enable = getattr(
        checkpointed.model, "activation_checkpointing_enable", checkpointed.model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    expected = HFGenerate().generate(plain, ask(), Sampling(12, 0), ENDS)
    assert HFGenerate().generate(checkpointed, ask(), Sampling(12, 0), ENDS) == expected


def test_scoring_under_autocast_leaves_gradients_to_the_training_pass():
    policy, requests = make("llama"), ask()
    samples = [Sample([11, 12, 7], True)] * len(requests)
    with torch.autocast("cpu", torch.bfloat16):
        score(policy, requests, samples, 1.0, torch.device("cpu"))
        policy.model(torch.tensor([[11, 12, 13]])).logits.float().pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable())


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 11)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for sampling in (Sampling(1), Sampling(1, 0.6), Sampling(1, 1.0, 4), Sampling(1, 1.0, 0, 0.75)):
        found = draw(logits.expand(count, -1), sampling, uniform).bincount(minlength=11) / count
        expected = (logits[0] / sampling.temperature).softmax(-1)
        if sampling.top_k:
            expected = expected * (expected >= expected.topk(4).values[-1])
        if sampling.top_p < 1:
            ordered, index = expected.sort(descending=True)
            inside = ordered.cumsum(0) - ordered < 0.75
            expected = torch.zeros(11).scatter(0, index[inside], ordered[inside])
        torch.testing.assert_close(found, expected / expected.sum(), atol=2e-4, rtol=0)


def test_draws_never_leave_the_support():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 1e-12):
        drawn = draw(logits, Sampling(1), torch.full((2,), u, dtype=torch.float64))
        assert drawn[0] in (0, 1)
        assert drawn[1] == 1


def test_batches_keep_to_the_budget_and_to_themselves():
    requests = ask(lengths=[2, 40, 3, 3, 25, 8, 8, 60, 5], new=10)
    batches = batches_by_length(requests, 70)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        width = max(len(requests[i].prompt_ids) for i in batch) + 10
        assert len(batch) == 1 or len(batch) * width <= 70
        assert batches_by_length([requests[i] for i in batch], 70) == [list(range(len(batch)))]  # once dealt, the same


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(UserError, match=f"`{next(iter(wrong))}`"):
        Sampling(**wrong)


def test_end_tokens_are_those_of_training_and_of_the_model():
    policy = make("llama")
    policy.causal_lm.generation_config.eos_token_id = [2, 5]
    assert end_tokens(policy, types.SimpleNamespace(eos_token_id=5)) == [5, 2]


# ---- other engines ----


def test_continuous_batching_gives_the_same_greedy_answers():
    policy, requests = make("llama"), ask()
    greedy = Sampling(12, temperature=0)
    backend = ContinuousBatching({"num_blocks": 8, "max_batch_tokens": 64})
    state = torch.get_rng_state()
    told: list[int] = []
    assert backend.generate(policy, requests, greedy, ENDS, told.append) == HFGenerate().generate(
        policy, requests, greedy, ENDS
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training
    assert len(told) == 1


def test_options_that_continuous_batching_does_not_have():
    with pytest.raises(UserError, match="does not take the `options`"):
        ContinuousBatching({"blocks": 8}).generate(make("llama"), ask(), Sampling(4), ENDS)


def test_vllm_has_to_be_there():
    with pytest.raises(UserError, match="pip install vllm"):
        VLLM().generate(make("llama"), ask(), Sampling(4), ENDS)


class FakeEngine:
    """Stands in for `vllm.LLM`: returns two tokens and says that it stopped."""

    def __init__(self, **settings):
        self.settings = settings

    def generate(self, prompts, settings, lora_request, use_tqdm):
        FakeEngine.called = (prompts, settings, lora_request)
        done = types.SimpleNamespace(token_ids=(11, 12), finish_reason="stop", stop_reason=None)
        return [types.SimpleNamespace(outputs=[done]) for _ in prompts]


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeEngine, lambda **settings: settings
    lora = types.ModuleType("vllm.lora.request")
    lora.LoRARequest = lambda *values: values
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)

    def install(version: str) -> None:
        module.__version__ = version

    return install


def test_vllm_of_an_unknown_version_is_refused(fake_vllm):
    fake_vllm("7.1.0")
    with pytest.raises(UserError, match=r"7\.1\.0"):
        VLLM().generate(make("llama"), ask(), Sampling(4), ENDS)


def test_vllm_is_handed_the_adapter_at_every_round(fake_vllm):
    from peft import LoraConfig, get_peft_model

    fake_vllm("0.11.2")
    with pytest.raises(UserError, match="LoRA"):
        VLLM().generate(make("llama"), ask(), Sampling(4), ENDS)
    model = get_peft_model(make("llama").model, LoraConfig(r=2, target_modules=["q_proj"]))
    policy, backend, requests = Policy(model), VLLM(), ask()
    names = []
    for _ in range(2):
        samples = backend.generate(policy, requests, Sampling(4, 0.5), ENDS)
        names.append(FakeEngine.called[2][:2])
    assert samples == [Sample([11, 12, 7], True)] * len(requests)
    assert names == [("policy-1", 1), ("policy-2", 2)]
    assert backend._engine.settings["max_lora_rank"] == 8
    for rank, taken in ((12, 16), (600, None)):
        policy = Policy(get_peft_model(make("llama").model, LoraConfig(r=rank, target_modules=["q_proj"])))
        if taken is None:
            with pytest.raises(UserError, match="up to rank 512"):
                VLLM().generate(policy, requests, Sampling(4), ENDS)
        else:
            (other := VLLM()).generate(policy, requests, Sampling(4), ENDS)
            assert other._engine.settings["max_lora_rank"] == taken
    seeds = [settings["seed"] for settings in FakeEngine.called[1]]
    assert len(set(seeds)) == len(requests)


def test_samples_of_engines_are_cut_at_their_end():
    assert cut_at_end([3, 7, 4], ENDS) == Sample([3, 7], True)
    assert cut_at_end([3, 4], ENDS) == Sample([3, 4], False)
