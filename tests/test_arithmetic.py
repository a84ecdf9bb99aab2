"""Responses are scored in float32 whatever precision the policy is in, and it is left as it was."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_bilevel.data.collate import collate
from lit_bilevel.policy.arithmetic import in_float32
from lit_bilevel.policy.logprobs import response_logprobs
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Example, Group, Response

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def made(name: str, dtype: torch.dtype, lora: bool) -> Policy:
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.3, tie_word_embeddings=True))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, initializer_range=0.3))
    model = model.to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model = model.to(dtype)
    return Policy(model).train()


def batch():
    responses = [Response([5, 6, 7], [0.0] * 3, True), Response([8, 9], [0.0] * 2, True)]
    return collate([Example(0, 0, [1, 2, 3], 3, Group(tuple(responses), 1.0, 0.8))], 1)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_scores_are_those_of_the_same_values_in_float32(name, dtype, autocast, lora):
    policy = made(name, dtype, lora)
    exact = Policy(copy.deepcopy(policy.model).float())
    before = [(tensor.data_ptr(), tensor.dtype) for tensor in (*policy.parameters(), *policy.buffers())]
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        found = response_logprobs(policy, batch())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, response_logprobs(exact, batch()), rtol=0, atol=2e-6)
    assert before == [(tensor.data_ptr(), tensor.dtype) for tensor in (*policy.parameters(), *policy.buffers())]


def test_all_comes_back_after_an_exception(monkeypatch):
    policy = made("llama", torch.bfloat16, False)
    layer, config = policy.layers()[1], policy.causal_lm.config
    monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")
    torch.set_float32_matmul_precision("high")
    seen = []

    def fail(*_):
        seen.extend((layer.self_attn.q_proj.weight.dtype, config._attn_implementation))
        seen.append(torch.get_float32_matmul_precision())
        raise RuntimeError("out of memory")

    handle = layer.self_attn.register_forward_pre_hook(fail)
    try:
        with (
            pytest.raises(RuntimeError, match="out of memory"),
            torch.autocast("cpu", dtype=torch.bfloat16),
            in_float32(policy),
        ):
            policy.outputs(torch.tensor([[1, 2, 3]]))
        assert seen == [torch.float32, "sdpa", "highest"]
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
        assert config._attn_implementation == "flash_attention_2"
        assert torch.get_float32_matmul_precision() == "high"
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
    finally:
        handle.remove()
        torch.set_float32_matmul_precision("highest")


def test_a_policy_in_float64_stays_in_it():
    policy = made("llama", torch.float64, False)
    assert response_logprobs(policy, batch()).dtype == torch.float64


class Linear4bit(torch.nn.Linear):
    """Stands in for the class of bitsandbytes: computes in a dtype of its own."""

    compute_dtype = torch.bfloat16

    def forward(self, x):
        weight, dtype = self.weight.to(self.compute_dtype), x.dtype
        return torch.nn.functional.linear(x.to(self.compute_dtype), weight).to(dtype)


def test_packed_matrices_are_multiplied_in_float32():
    policy = made("llama", torch.float32, False)
    expected = response_logprobs(policy, batch())
    for layer in policy.layers():
        layer.mlp.up_proj.__class__ = Linear4bit
    torch.testing.assert_close(response_logprobs(policy, batch()), expected)
    assert policy.layers()[0].mlp.up_proj.compute_dtype == torch.bfloat16
