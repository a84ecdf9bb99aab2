"""Reads from a configuration how many tokens a policy takes, and how many different ones.

    GPT-2, n_positions 64: an answer to a prompt of 60 tokens has room for 4

Left out: contexts that a configuration does not name; Mamba, RWKV and BLOOM have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAMES = ("max_position_embeddings", "max_seq_len")


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions that a model was made for; `None` where its configuration does not say."""
    text = config.get_text_config()
    return next((value for name in NAMES if (value := getattr(text, name, None)) is not None), None)


def vocabulary_of(config: PreTrainedConfig) -> int:
    """Tokens that a model has embeddings for."""
    return config.get_text_config().vocab_size


def room(context: int | None, prompt_length: int, most: int) -> int:
    """New tokens that an answer may have; 0 or less where there is no place for one."""
    return most if context is None else min(most, context - prompt_length)
