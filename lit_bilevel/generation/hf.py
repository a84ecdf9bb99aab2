"""Generates responses by plain transformers: the default backend.

How a batch is decoded is chosen by trying what the model can do (see `decode`); what is sampled is the policy's
distribution in any case, as `sampling` says. Of the model's own generation settings only its end tokens hold (see
`ending`).

Example: `HFGenerate(token_budget=8192)` decodes two prompts of 300 tokens and up to 3,700 new ones each together.

Left out: engines with a cache of their own; see `backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_bilevel.generation.base import GenerationBackend, Request, Sample, Sampling, batches_by_length
from lit_bilevel.generation.decode import decode, decoder_for
from lit_bilevel.generation.ending import end_tokens
from lit_bilevel.policy.context import context_of, room
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HFGenerate(GenerationBackend):
    """Batched generation by the transformers model itself.

    Args:
        token_budget: tokens of a batch, prompts and new ones together; bounds the KV cache.
    """

    token_budget: int = 1 << 14

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return batches_by_length(requests, self.token_budget)

    def check(self, policy: Policy) -> None:
        with policy.evaluating():
            decoder_for(policy)

    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        samples: list[Sample | None] = [None] * len(requests)
        with policy.evaluating():
            for batch in self.batches(requests):
                drawn = decode(policy, [requests[i] for i in batch], sampling, end_ids, progress)
                for index, sample in zip(batch, drawn, strict=True):
                    samples[index] = sample
        return [sample for sample in samples if sample is not None]


def answers(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_new_tokens: int
) -> list[dict[str, str]]:
    """Greedy answers as dicts of `id`, `prompt` and `response`, each within the policy's context."""
    context = context_of(policy.causal_lm.config)
    rooms = [room(context, len(q.prompt_ids), max_new_tokens) for q in questions]
    requests = [Request(q.prompt_ids, (q.row,), most) for q, most in zip(questions, rooms, strict=True)]
    sampling = Sampling(max_new_tokens, temperature=0)
    samples = HFGenerate().generate(policy, requests, sampling, end_tokens(policy, tokenizer))
    texts = tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
    return [{"id": q.id, "prompt": q.prompt, "response": text} for q, text in zip(questions, texts, strict=True)]
