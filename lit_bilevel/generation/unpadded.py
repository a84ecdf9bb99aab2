"""Decodes prompts of equal length together, by the model's own `generate`: for every model that has one.

A state that runs through a sequence (Mamba, RWKV, hybrids) would run through padding too, and caches that hold one
cannot lose rows. So prompts of one length go together, without padding, and rows that have ended stay until the last
one has. The library does the decoding, and asks what is sampled here for every token.

Left out: batches of prompts of different lengths; where lengths are all different, this is one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_bilevel.generation.base import cut_at_end
from lit_bilevel.generation.ending import without_settings
from lit_bilevel.generation.padded import Choose
from lit_bilevel.policy.causal import embeddings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode_unpadded(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    end_ids: Sequence[int],
    choose: Choose,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, its end token included; the arguments are those of `decode_padded`."""
    from transformers import GenerationConfig

    tokens: list[list[int]] = [[] for _ in prompts]
    device = embeddings_of(model).device
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        row_B, limit_B = (torch.tensor(x, device=device) for x in (rows, [limits[row] for row in rows]))
        config = GenerationConfig(
            max_new_tokens=int(limit_B.max()),
            do_sample=False,  # what is drawn here is the only token left
            eos_token_id=list(end_ids) or None,
            pad_token_id=next(iter(end_ids), 0),  # of rows that have ended; cut off below
        )
        input_ids = torch.tensor([prompts[row] for row in rows], device=device)
        library: Any = model  # it mixes `generate` into models without telling their types
        with without_settings(model):
            output = library.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                logits_processor=[_Drawn(choose, row_B, length)],
                stopping_criteria=[_Limits(length + limit_B)],
            )
        for row, ids in zip(rows, output[:, length:].tolist(), strict=True):
            tokens[row] = cut_at_end(ids[: limits[row]], end_ids).token_ids
        if progress is not None:
            progress(sum(len(tokens[row]) for row in rows))
    return tokens


def decode_singly(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    end_ids: Sequence[int],
    choose: Choose,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The same one prompt at a time, for models whose state mixes the rows of a batch (RWKV in transformers 5)."""

    def answer(row: int) -> list[int]:
        def own(row_B: Tensor, step: int, logits_BV: Tensor) -> Tensor:
            return choose(row_B + row, step, logits_BV)

        return decode_unpadded(model, [prompts[row]], [limits[row]], end_ids, own, progress)[0]

    return [answer(row) for row in range(len(prompts))]


class _Drawn:
    """Leaves the token that is drawn as the only possible one."""

    def __init__(self, choose: Choose, row_B: Tensor, prompt_length: int):
        self.choose, self.row_B, self.prompt_length = choose, row_B, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_B = self.choose(self.row_B, input_ids.shape[1] - self.prompt_length, scores.float())
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B[:, None], 0.0)


class _Limits:
    """Ends every row at its own length."""

    def __init__(self, limit_B: Tensor):
        self.limit_B = limit_B

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.limit_B
