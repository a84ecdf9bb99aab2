"""Finds the tokens that end an answer, and sets aside a model's other generation settings.

A model folder may ask for a temperature, a penalty or suppressed tokens. None of them is part of the distribution that
is trained, so refinement samples without them, `predict` is greedy without them, and the exported folder says so in its
`generation_config.json`: transformers' `generate` then answers as `predict` does.

    tokenizer: eos </turn>, pad none        model: eos [2, 5], do_sample, temperature 0.7, repetition_penalty 1.1
    exported:  eos [</turn>, 2, 5], pad </turn>, greedy, `max_new_tokens` of the run

Left out: end strings, and other limits on an answer than its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lit_bilevel.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
"""Said in exported settings, for where they are handed to a model with others, which `generate` would fill in."""


def end_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's, which training teaches, and those the model came with."""
    own = getattr(policy.causal_lm.generation_config, "eos_token_id", None)
    others = [] if own is None else [own] if isinstance(own, int) else own
    return list(dict.fromkeys([tokenizer.eos_token_id, *(token for token in others if token >= 0)]))  # -1 is none


def settings_to_export(policy: Policy, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """The `GenerationConfig` under which `generate` answers as `predict` does.

    Args:
        policy: the unwrapped policy.
        tokenizer: the one that it was trained with.
        max_new_tokens: longest answer.
    """
    from transformers import GenerationConfig

    ends = end_tokens(policy, tokenizer)
    pad = tokenizer.pad_token_id
    # `generate` takes a pad token in a prompt for padding where it is given no mask, unless it ends answers
    if pad is None or pad in (tokenizer.bos_token_id, tokenizer.unk_token_id):
        pad = ends[0]
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=pad,
        **NEUTRAL,
    )


@contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """No generation settings of the model's own: `generate` fills what it is not given from them."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
