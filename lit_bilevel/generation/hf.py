"""Generating responses: the socket for backends, and the default on plain transformers.

Requests are sorted by length and cut into batches under a token budget *before* they are dealt out to processes. How a
batch is decoded is chosen by trying what the model can do (see `decode`); what is sampled is the policy's distribution
in any case, as `sampling` says. Of the model's own generation settings only its end tokens hold (see `ending`).

Log-probabilities are not taken from here: cached ones differ from the trainer's (lit_bilevel/README.md 6.1);
see `score`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_bilevel.generation.decode import decoded, decoder_for
from lit_bilevel.generation.ending import end_tokens
from lit_bilevel.generation.sampling import Request, Sample, Sampling, batches_by_length
from lit_bilevel.policy.context import context_of, room
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Question


class GenerationBackend(ABC):
    """Makes responses with the current policy; the socket for other engines."""

    @abstractmethod
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], Any] | None = None,
    ) -> list[Sample]:
        """One sample per request, in the order of the requests.

        Args:
            policy: the unwrapped policy; its modes, and the random states of training, must be left as they were.
            requests: what to generate.
            sampling: how.
            end_ids: tokens that end a response.
            progress: told the number of new tokens now and then.
        """

    def check(self, policy: Policy) -> None:  # noqa: B027 - most backends refuse nothing
        """Refuse, before a run starts, a policy that this backend cannot generate with.

        Raises:
            UserError: saying why.
        """

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that are generated together; each batch is dealt to one process."""
        return batches_by_length(requests, 1 << 14)


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
        progress: Callable[[int], Any] | None = None,
    ) -> list[Sample]:
        samples: list[Sample | None] = [None] * len(requests)
        with policy.evaluating():
            for batch in self.batches(requests):
                found = decoded(policy, [requests[i] for i in batch], sampling, end_ids, progress)
                for index, sample in zip(batch, found, strict=True):
                    samples[index] = sample
        return [sample for sample in samples if sample is not None]


def answers(policy: Policy, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> list[dict[str, str]]:
    """Greedy answers as dicts of `id`, `prompt` and `response`, each within the policy's context."""
    context = context_of(policy.causal_lm.config)
    rooms = [room(context, len(q.prompt_ids), max_new_tokens) for q in questions]
    requests = [Request(q.prompt_ids, (q.row,), most) for q, most in zip(questions, rooms, strict=True)]
    sampling = Sampling(max_new_tokens, temperature=0)
    samples = HFGenerate().generate(policy, requests, sampling, end_tokens(policy, tokenizer))
    texts = tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
    return [{"id": q.id, "prompt": q.prompt, "response": text} for q, text in zip(questions, texts, strict=True)]
