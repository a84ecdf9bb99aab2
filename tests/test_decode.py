"""Decoding is the policy's own distribution for every architecture, or is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.architectures import ARCHITECTURES, tiny
from transformers import BertConfig, BertLMHeadModel, PreTrainedConfig

from lit_bilevel.errors import UserError
from lit_bilevel.generation import decode
from lit_bilevel.generation.base import Request, Sampling
from lit_bilevel.generation.decode import _alike_up_to, decoder_for
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.generation.padded import decode_padded, decode_shared
from lit_bilevel.generation.respond import score
from lit_bilevel.generation.sampling import LIMIT, uniforms
from lit_bilevel.generation.unpadded import decode_singly, decode_unpadded
from lit_bilevel.policy.causal import check_causal
from lit_bilevel.policy.load import PolicySettings, load_policy
from lit_bilevel.policy.policy import Policy

ENDS = [7, 8, 9, 10]
FEW = ("gemma2", "gpt2", "lfm2", "mamba2", "rwkv")  # a window, learned positions, a hybrid, a state, no cache
STATES = {
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax"),
    *("nemotron_h", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba2"),
}
NEAR = {
    *("cohere2", "gemma2", "gemma3_text", "gpt_neo", "gpt_oss", "mistral", "mpt", "phi3", "starcoder2"),
}  # windows, or biases by distance: padding may not stand inside of a row


def ask() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 60, (n,), generator=generator).tolist() for n in (3, 17, 5, 9, 9, 2, 30, 11)]
    return [Request(prompt, (0, 0, row, 0), 12 - row % 3) for row, prompt in enumerate(prompts)]


def librarys(model, requests: list[Request]) -> list[list[int]]:
    """Greedy answers by `generate`, one by one."""
    answers = []
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        settings = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, **settings
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def check(name: str) -> None:
    """Batched answers are the library's, sampled ones do not depend on batches, and scores are those of whole rows."""
    model, requests = tiny(name), ask()
    check_causal(model)
    policy = Policy(model)
    greedy = [sample.token_ids for sample in HFGenerate().generate(policy, requests, Sampling(12, 0), ENDS)]
    assert greedy == librarys(model, requests)
    ways = {"rwkv": decode_singly} | dict.fromkeys(STATES, decode_unpadded) | dict.fromkeys(NEAR, decode_padded)
    assert policy.decoder is ways.get(name, decode_shared)
    samples = HFGenerate().generate(policy, requests, Sampling(12), ENDS)
    assert HFGenerate(1).generate(policy, requests, Sampling(12), ENDS) == samples
    assert [sample.token_ids for sample in samples] != greedy
    scored = score(policy.train(), requests, samples, 1.0, torch.device("cpu"))
    model.eval()
    for request, sample, response in zip(requests, samples, scored, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt_ids + sample.token_ids]), use_cache=False).logits[0]
        start = len(request.prompt_ids)
        found = logits.log_softmax(-1)[range(start - 1, start - 1 + len(sample.token_ids)), sample.token_ids]
        assert response.token_logprobs == pytest.approx(found.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_answers_are_the_librarys(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FEW])
def test_answers_of_many_architectures_are_the_librarys(name):
    check(name)


@pytest.mark.parametrize("way", ["raises", "deviates"])
def test_a_decoder_that_is_not_right_is_not_used(monkeypatch, way):
    """Whether padding leads to an error or to other logits, the library does the decoding."""
    policy = Policy(tiny("llama"))

    def wrong(model, prompts, limits, end_ids, choose, progress=None):
        if way == "raises":
            raise KeyError("no such cache")
        return decode_unpadded(model, prompts, limits, end_ids, lambda r, s, x: choose(r, s, x + x.std() * x.sin()))

    monkeypatch.setattr(decode, "decode_shared", wrong)
    monkeypatch.setattr(decode, "decode_padded", wrong)
    with policy.evaluating():
        assert decoder_for(policy) is decode_unpadded
    assert policy.decoder is decode_unpadded


@pytest.mark.parametrize(("how", "told"), [("raises", "ends in an error"), ("deviates", "gives other logits")])
def test_a_policy_that_no_decoder_is_right_for_is_refused(monkeypatch, how, told):
    policy = Policy(tiny("mamba"))
    forward = policy.causal_lm.forward

    def broken(*args, use_cache=None, **given):
        output = forward(*args, use_cache=use_cache, **given)
        if use_cache is not False:  # while generating alone
            if how == "raises":
                raise RuntimeError("no cache")
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(policy.causal_lm, "forward", broken)
    with pytest.raises(UserError, match=f"`MambaForCausalLM` under transformers .* {told}"):
        HFGenerate().check(policy)
    assert not policy.causal_lm.training


def test_the_decoder_is_tried_once(monkeypatch):
    policy, tried = Policy(tiny("llama")), []
    monkeypatch.setattr(decode, "_deviation", lambda model, way: tried.append(way) or 0.0)
    for _ in range(2):
        HFGenerate().generate(policy, ask(), Sampling(3, 0), ENDS)
    assert tried == [decode_shared]


def test_rows_whose_positions_depend_on_others_go_by_length(monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", max_position_embeddings=24, rope_parameters=rope)
    assert _alike_up_to(model.config) == 24
    assert _alike_up_to(tiny("llama").config) == float("inf")
    nested = PreTrainedConfig()
    nested.rope_parameters = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16}}
    assert _alike_up_to(nested) == 16
    asked = []

    def noted(*given):
        asked.append(len(given[1]))
        return decode_unpadded(*given)

    monkeypatch.setattr(decode, "decode_unpadded", noted)
    requests = [request for request in ask() if len(request.prompt_ids) < 15]
    HFGenerate().generate(Policy(model), requests, Sampling(5, 0), ENDS)  # at most 11 + 5 tokens
    assert not asked
    HFGenerate().generate(Policy(model), ask(), Sampling(5, 0), ENDS)
    assert asked == [8]


def test_models_whose_tokens_see_later_ones_are_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=48, is_decoder=False))
    with pytest.raises(UserError, match="`BertLMHeadModel` lets tokens see the ones after them"):
        check_causal(encoder)
    decoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=48, is_decoder=True)).train()
    check_causal(decoder)
    assert decoder.training


def test_a_cache_with_a_state_is_never_padded(monkeypatch):
    """In bfloat16 a state that padding went through may deviate little."""
    policy = Policy(tiny("mamba2"))
    monkeypatch.setattr(decode, "_deviation", lambda model, way: 0.0)
    HFGenerate().check(policy)
    assert policy.decoder is decode_unpadded


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])  # rotary, learned and no positions
def test_a_beginning_that_all_prompts_share_is_read_once(name):
    policy = Policy(tiny(name))
    requests = [replace(request, prompt_ids=[11, 12, 13, *request.prompt_ids]) for request in (*ask(), ask()[0])]
    requests.append(replace(requests[0], prompt_ids=[11, 12, 13]))  # nothing but the beginning
    expected = librarys(policy.causal_lm.eval(), requests)
    read: list[tuple[int, ...]] = []
    HFGenerate().check(policy)
    hook = policy.causal_lm.register_forward_pre_hook(
        lambda model, arguments, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    samples = HFGenerate().generate(policy, requests, Sampling(12, 0), ENDS)
    hook.remove()
    assert [sample.token_ids for sample in samples] == expected
    assert read[:2] == [(1, 2), (9, 31)]  # of ten prompts two are equal; the last token of the shortest is its own
    samples = HFGenerate().generate(policy, requests[:1] * 2, Sampling(12, 0), ENDS)
    assert [sample.token_ids for sample in samples] == expected[:1] * 2  # all alike


@pytest.mark.parametrize("way", [decode_shared, decode_padded, decode_unpadded, decode_singly])
def test_every_answer_has_its_own_limit(way):
    """Also one whose batch goes on, and none is taken for ended that was cut."""
    policy, told = Policy(tiny("llama" if way in (decode_shared, decode_padded) else "mamba2")), []
    requests = [replace(request, max_new_tokens=2 + row) for row, request in enumerate([ask()[3]] * 3)]
    policy.decoder = way
    samples = HFGenerate().generate(policy, requests, Sampling(3, 0), [63], told.append)
    assert [len(sample.token_ids) for sample in samples] == [2, 3, 3]
    assert not any(sample.finished for sample in samples)
    assert sum(told) == 8


def test_settings_of_the_model_do_not_change_what_a_state_gives():
    """`generate` fills what it is not given from the model's own settings."""
    policy, requests = Policy(tiny("mamba2")), ask()
    expected = HFGenerate().generate(policy, requests, Sampling(12), ENDS)
    own = {"repetition_penalty": 9.0, "suppress_tokens": list(range(30)), "min_new_tokens": 12, "max_length": 5}
    policy.causal_lm.generation_config.update(**own)
    settings = policy.causal_lm.generation_config
    assert HFGenerate().generate(policy, requests, Sampling(12), ENDS) == expected
    assert policy.causal_lm.generation_config is settings


def test_rwkv_keeps_its_parameters_in_evaluation(tmp_path):
    tiny("rwkv").save_pretrained(tmp_path)
    policy = load_policy(PolicySettings(str(tmp_path)), torch.float32)
    before = [parameter.clone() for parameter in policy.parameters()]
    ids = torch.tensor([[3, 4, 5, 6]])
    with policy.evaluating():
        found = policy.causal_lm(ids, use_cache=False).logits
        assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
        torch.testing.assert_close(found, tiny("rwkv")(ids, use_cache=False).logits)


def test_uniform_numbers_stay_below_their_limit(monkeypatch):
    """A draw at 1 would be a token past the last."""
    monkeypatch.setattr(torch, "rand", lambda *sizes, generator, dtype: torch.ones(*sizes, dtype=dtype))
    assert (uniforms(ask()[:2], 3) == LIMIT).all()
    assert LIMIT < 1
