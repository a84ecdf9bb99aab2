"""Finds what every assistant turn begins with, so that a response can be scored without its prompt.

With a chat template the response follows BOS (where the template sets it) and the tokens that all prompts end with: the
end of a user turn and the beginning of an assistant's. So it looks to the model like an answer, to a question that it
does not see. Without a template it follows BOS alone, or EOS where the tokenizer has no BOS.
Both losses of a row are of the same token ids; nothing is tokenized again.

    <|user|>2 + 2?<|end|><|assistant|>4<|end|>    →    <|end|><|assistant|>4<|end|>

Left out: rows without a prompt; they have no such loss.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from lit_bilevel.data.encode import Encoder
from lit_bilevel.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that a response without a prompt follows; at least one.

    Raises:
        UserError: as `Encoder` does.
    """
    encoder = Encoder(tokenizer, 1 << 20)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if not tokenizer.chat_template:
        return bos or [tokenizer.eos_token_id]
    first, second = encoder.prompts(["one?", "two!"])
    ends = zip(reversed(first), reversed(second), strict=False)
    shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends)][::-1]
    begin = bos if first[:1] == bos else []
    return [*begin, *shared] or bos or [tokenizer.eos_token_id]


def last_response(example: Example) -> Example:
    """The example with its last response alone to be predicted, of a pair the chosen one."""
    return replace(example, earlier=[], rejected_ids=None, group=None)


def has_prompt(example: Example) -> bool:
    """Whether anything but BOS stands before the response."""
    return example.response_start > 1


def without_prompt(example: Example, opening: list[int]) -> Example:
    """The response alone.

    Args:
        example: with one response.
        opening: what it follows instead of its prompt.
    """
    ids = [*opening, *example.input_ids[example.response_start :]]
    return replace(example, input_ids=ids, response_start=len(opening))
