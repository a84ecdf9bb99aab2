"""Requests, and engines that are asked them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config

from lit_bilevel.generation.base import Request
from lit_bilevel.policy.policy import Policy

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=128),
    "neox": lambda: GPTNeoXConfig(**SIZES, max_position_embeddings=128, hidden_dropout=0.2, attention_dropout=0.1),
    "qwen": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=128),
}
ENDS = [7, 8, 9]


def make(name: str) -> Policy:
    """A random policy in training mode with sharp next-token distributions."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return Policy(model).train()


def ask(lengths=(3, 17, 5, 9, 9, 2, 30, 11), new=12, round=0) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 60, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, (0, round, row, 0), new) for row, prompt in enumerate(prompts)]
