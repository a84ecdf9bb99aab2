"""Decodes prompts of different lengths together, for models whose cache holds keys and values and nothing else.

Prompts are padded on the left, a mask and positions tell the model so, and rows that have ended leave the batch and its
cache. A prompt that is to be answered several times is read once: its keys and values are copied. So is a beginning
that all prompts share, such as a system prompt; the padding then stands behind it:

    decode_padded    [pad pad sys sys a b]  [sys sys a b c d]       decode_shared    sys sys | [pad pad a b]  [a b c d]

Left out: models with a state that padding would go through, see `unpadded`; and beginnings that some prompts share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_bilevel.policy.causal import embeddings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Choose = Callable[[Tensor, int, Tensor], Tensor]
"""From the rows [B] that go on, the number of the step and their logits [B, V] to their next tokens [B]."""


def decode_padded(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    end_ids: Sequence[int],
    choose: Choose,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, its end token included.

    Args:
        model: a transformers causal LM in evaluation mode.
        prompts: token ids.
        limits: longest answer to each prompt.
        end_ids: tokens that end an answer.
        choose: what draws the tokens.
        progress: told the number of new tokens after each step.
    """
    return _decode(_Padded(model, prompts, limits, end_ids, shared=0), choose, progress)


def decode_shared(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    end_ids: Sequence[int],
    choose: Choose,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The same, the beginning that all prompts share read once; the arguments are those of `decode_padded`."""
    shared = 0
    if any(prompt != prompts[0] for prompt in prompts):
        shortest = min(map(len, prompts))
        different = (n for n, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
        # a row keeps at least its last token, for the logits after it are asked for
        shared = min(next(different, shortest), shortest - 1)
    return _decode(_Padded(model, prompts, limits, end_ids, shared), choose, progress)


def _decode(batch: _Padded, choose: Choose, progress: Callable[[int], object] | None) -> list[list[int]]:
    step = 0
    while len(batch.alive):
        drawn_B = choose(batch.alive_B, step, batch.logits(step))
        if progress is not None:
            progress(len(batch.alive))
        batch.append(drawn_B)
        step += 1
    return batch.tokens


class _Padded:
    """One batch; row b of the tensors is the prompt `alive[b]`."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        end_ids: Sequence[int],
        shared: int,
    ):
        from transformers import DynamicCache

        self.model, self.limits, self.end_ids = model, list(limits), frozenset(end_ids)
        self.device = embeddings_of(model).device
        self.tokens: list[list[int]] = [[] for _ in prompts]
        accepted = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in accepted  # models without rotary or learned positions take none
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache = DynamicCache(config=model.config)
        self.alive = list(range(len(prompts)))
        self.alive_B = torch.tensor(self.alive, device=self.device)
        self.width = width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width + max(limits), dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            ids[b, :shared] = torch.tensor(prompt[:shared])
            ids[b, width - len(prompt) + shared :] = torch.tensor(prompt[shared:])
            mask[b, :shared] = 1
            mask[b, width - len(prompt) + shared :] = 1
        # equal prompts, as the G answers of a row have, are read once; the cache is copied for the others
        first: dict[tuple[int, ...], int] = {}
        for b, prompt in enumerate(prompts):
            first.setdefault(tuple(prompt), b)
        index = {prompt: number for number, prompt in enumerate(first)}
        self.first = torch.tensor(list(first.values()), device=self.device)  # of each different prompt
        self.index_B = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        self.input_ids, self.mask = ids.to(self.device), mask.to(self.device)
        self.offset = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        self.shared = shared

    def logits(self, step: int) -> Tensor:
        """Of the next token of every row, [B, V]."""
        if step > 0:
            return self._logits(self.width + step, self.input_ids, self.mask, self.offset)
        ids, mask, offset = (t[self.first] for t in (self.input_ids, self.mask, self.offset))
        if self.shared:
            self._logits(self.shared, ids[:1, : self.shared], mask[:1], torch.zeros_like(offset[:1]))
            self.cache.batch_select_indices(torch.zeros_like(self.first))
        logits = self._logits(self.width, ids[:, self.shared :], mask, offset)
        if len(self.first) == len(self.index_B):
            return logits
        self.cache.batch_select_indices(self.index_B)
        return logits[self.index_B]

    def _logits(self, seen: int, input_ids: Tensor, mask: Tensor, offset: Tensor) -> Tensor:
        """One pass over new tokens; `seen` counts those in the cache as well."""
        positions = torch.arange(seen - input_ids.shape[1], seen, device=self.device) - offset[:, None]
        extra = {"position_ids": positions.clamp_min(0)} if self.positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask[:, :seen],
            past_key_values=self.cache,
            use_cache=True,
            **extra,
            **self.last_only,
        )
        return output.logits[:, -1].float()

    def append(self, drawn_B: Tensor) -> None:
        """Add a token to every row; rows that have ended leave."""
        for prompt, token in zip(self.alive, drawn_B.tolist(), strict=True):
            self.tokens[prompt].append(token)
        going = [
            b
            for b, prompt in enumerate(self.alive)
            if self.tokens[prompt][-1] not in self.end_ids and len(self.tokens[prompt]) < self.limits[prompt]
        ]
        self.input_ids = drawn_B[:, None]
        # a row that stayed after its end would be computed until the longest one ends
        if len(going) < len(self.alive):
            self.alive = [self.alive[b] for b in going]
            kept = torch.tensor(going, dtype=torch.int64, device=self.device)
            self.input_ids, self.mask, self.offset = self.input_ids[kept], self.mask[kept], self.offset[kept]
            self.alive_B = self.alive_B[kept]
            if going:
                self.cache.batch_select_indices(kept)
