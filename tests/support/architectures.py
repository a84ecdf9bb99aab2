"""Tiny random causal language models of many architectures."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBA_LAYERS = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16}
WINDOW = {"sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "bamba": {**GROUPED, **MAMBA_LAYERS, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "biogpt": {**PLAIN, "max_position_embeddings": 128},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "cohere": GROUPED,
    "cohere2": {**GROUPED, **WINDOW},
    "deepseek_v3": {
        **{**PLAIN, "num_key_value_heads": 4, "max_position_embeddings": 128, "n_routed_experts": 8, "n_group": 2},
        **{"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
    "falcon": {**PLAIN, "alibi": True, "new_decoder_architecture": False},
    "falcon_h1": {**GROUPED, **MAMBA_LAYERS, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "falcon_mamba": MAMBA,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **WINDOW},
    "gemma3_text": {**GROUPED, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "max_position_embeddings": 128},
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": {**PLAIN, "max_position_embeddings": 128},
    "gpt_oss": {**GROUPED, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "granite": GROUPED,
    "granitemoehybrid": {
        **{**GROUPED, **MAMBA_LAYERS, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    },
    "jamba": {
        **{**GROUPED, "num_experts": 4, "mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": GROUPED,
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "minimax": {**GROUPED, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "mistral": {**GROUPED, **WINDOW},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nemotron": GROUPED,
    "nemotron_h": {
        **{**GROUPED, "layers_block_type": ["mamba", "attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 4},
        **{"mamba_head_dim": 16, "n_groups": 1},
    },
    "olmo2": GROUPED,
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "phi": {**PLAIN, "max_position_embeddings": 128},
    "phi3": {**GROUPED, **WINDOW},
    "qwen2": GROUPED,
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": GROUPED,
    "qwen3_5_text": {**GROUPED, **LINEAR},
    "qwen3_moe": {**GROUPED, **EXPERTS},
    "qwen3_next": {**GROUPED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        **{**PLAIN, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "lru_width": 32},
        "attention_window_size": 16,
    },
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 7, "context_length": 128},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, **WINDOW},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    "zamba2": {
        **{**GROUPED, "num_mem_blocks": 1, "use_mem_rope": True, "n_mamba_heads": 8, "mamba_headdim": 8},
        **{"mamba_d_state": 8, "mamba_ngroups": 1, "num_hidden_layers": 3},
        **{"layers_block_type": ["mamba", "hybrid", "mamba"], "attention_head_dim": 16, "attention_hidden_size": 64},
    },
}


def tiny(name: str, **changes: Any) -> Any:
    """A random model with sharp next-token distributions, in evaluation mode."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(name, **{**special, **ARCHITECTURES[name], **changes})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2 and "conv" not in key and "A_log" not in key:
                parameter.mul_(6)
    return model.eval()


def saved(folder: Any, name: str, tokenizer: Any, **changes: Any) -> str:
    """A folder with such a model, its vocabulary that of a tokenizer, which is put beside it."""
    tiny(name, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
