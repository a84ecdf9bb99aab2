"""Generating responses: the socket for backends, and the default on plain transformers.

    y_t = F_t⁻¹(u_t)        F_t the distribution function of softmax(z_t / T), cut by top-k and top-p        u_t uniform

Every response has a stream of uniform numbers of its own, seeded by (seed, round, row, sample), so what is sampled
depends on neither the number of processes nor the size of batches (but for ties within rounding), and the random state
of training is not touched. Requests are sorted by length and cut into batches under a token budget *before* they are
dealt out to processes. Prompts are padded on the left; rows that have ended leave the batch and its KV cache.

Log-probabilities are not taken from here: cached ones differ from the trainer's (METHOD section 3); see `score`.
Left out: beam search, penalties, and models that need more than a mask and positions (encoder–decoder, prefix tuning).
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_bilevel.errors import gathered
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Question

LIMIT = 1 - 1e-12  # uniforms stay below it, so that rounding never selects past the last possible token


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens: longest response.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only; 0 for all.
        top_p: sample from the smallest set of tokens with this much probability; 1 for all.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"`max_new_tokens` is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            problems.append(f"`temperature` is {self.temperature}; it must be at least 0 (0 is greedy)")
        if self.top_k < 0:
            problems.append(f"`top_k` is {self.top_k}; it must be at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            problems.append(f"`top_p` is {self.top_p}; it must be in (0, 1] (1 is off)")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            problems.append("`temperature` is 0 (greedy), where `top_k` and `top_p` do nothing; leave them out")
        if problems:
            raise gathered("bad sampling settings", problems)


@dataclass(frozen=True)
class Request:
    """One response to generate.

    Args:
        prompt_ids: token ids of the prompt.
        stream: the key (seed, round, row, sample) of its random numbers.
        max_new_tokens: longest response to this prompt.
    """

    prompt_ids: list[int]
    stream: tuple[int, ...]
    max_new_tokens: int

    @property
    def seed(self) -> int:
        """63 bits that belong to this stream alone."""
        digest = hashlib.sha256("/".join(map(str, self.stream)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Sample:
    """Sampled ids, the end token included if it was drawn; `finished` if it was."""

    token_ids: list[int]
    finished: bool


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
                decoder = _Decoder(policy.causal_lm, [requests[i] for i in batch], sampling, end_ids)
                for index, sample in zip(batch, decoder.run(progress), strict=True):
                    samples[index] = sample
        return [sample for sample in samples if sample is not None]


def end_tokens(policy: Policy, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's, which training teaches, and those the model came with."""
    own = getattr(policy.causal_lm.generation_config, "eos_token_id", None)
    others = [] if own is None else [own] if isinstance(own, int) else own
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


def answers(policy: Policy, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int) -> list[dict[str, str]]:
    """Greedy answers as dicts of `id`, `prompt` and `response`."""
    requests = [Request(q.prompt_ids, (q.row,), min(max_new_tokens, q.room)) for q in questions]
    sampling = Sampling(max_new_tokens, temperature=0)
    samples = HFGenerate().generate(policy, requests, sampling, end_tokens(policy, tokenizer))
    texts = tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
    return [{"id": q.id, "prompt": q.prompt, "response": text} for q, text in zip(questions, texts, strict=True)]


def batches_by_length(requests: Sequence[Request], token_budget: int) -> list[list[int]]:
    """Requests of like length together, each batch at most `token_budget` tokens, or one request."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].stream))
    batches: list[list[int]] = []
    longest_new = 0
    for index in order:
        request = requests[index]
        longest_new = max(longest_new, request.max_new_tokens)
        width = len(request.prompt_ids) + longest_new  # the longest prompt so far: they come sorted
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            longest_new = request.max_new_tokens
        batches[-1].append(index)
    return batches


class _Decoder:
    """Generates one batch; row b of the tensors is the request `alive[b]`."""

    def __init__(self, model: Any, requests: Sequence[Request], sampling: Sampling, end_ids: Sequence[int]):
        self.model, self.sampling = model, sampling
        self.device = model.get_input_embeddings().weight.device
        self.limits = [min(request.max_new_tokens, sampling.max_new_tokens) for request in requests]
        self.end_ids = frozenset(end_ids)
        self.tokens: list[list[int]] = [[] for _ in requests]
        accepted = inspect.signature(model.forward).parameters
        self.positions = "position_ids" in accepted
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.alive = list(range(len(requests)))
        self._prepare(requests)

    def _prepare(self, requests: Sequence[Request]) -> None:
        width, steps = max(len(request.prompt_ids) for request in requests), max(self.limits)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros(len(requests), width + steps, dtype=torch.int64)
        for b, request in enumerate(requests):
            length = len(request.prompt_ids)
            ids[b, width - length :] = torch.tensor(request.prompt_ids)
            mask[b, width - length :] = 1
        self.width = width
        self.input_ids, self.mask = ids.to(self.device), mask.to(self.device)
        self.offset = torch.tensor([width - len(request.prompt_ids) for request in requests], device=self.device)
        if self.sampling.temperature > 0:
            uniform = [
                torch.rand(steps, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
                for request in requests
            ]
            self.uniform = torch.stack(uniform).clamp_max(LIMIT).to(self.device)

    def run(self, progress: Callable[[int], Any] | None) -> list[Sample]:
        """Sample until every response has ended."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        step = 0
        while self.alive:
            drawn = self._step(cache, step)
            for request, token in zip(self.alive, drawn.tolist(), strict=True):
                self.tokens[request].append(token)
            if progress is not None:
                progress(len(self.alive))
            self._drop_ended(cache, drawn)
            step += 1
        return [Sample(ids, ids[-1] in self.end_ids) for ids in self.tokens]

    def _step(self, cache: Any, step: int) -> Tensor:
        """The next token of every row, [B]."""
        seen = self.width + step
        positions = torch.arange(seen - self.input_ids.shape[1], seen, device=self.device) - self.offset[:, None]
        extra = {"position_ids": positions.clamp_min(0)} if self.positions else {}
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask[:, :seen],
            past_key_values=cache,
            use_cache=True,
            **extra,
            **self.last_only,
        )
        logits_BV = output.logits[:, -1].float()
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        return draw(logits_BV, self.sampling, self.uniform[:, step])

    def _drop_ended(self, cache: Any, drawn: Tensor) -> None:
        going = [
            b
            for b, request in enumerate(self.alive)
            if self.tokens[request][-1] not in self.end_ids and len(self.tokens[request]) < self.limits[request]
        ]
        self.input_ids = drawn[:, None]
        if len(going) < len(self.alive):
            self.alive = [self.alive[b] for b in going]
            kept = torch.tensor(going, dtype=torch.int64, device=self.device)
            self.input_ids, self.mask, self.offset = self.input_ids[kept], self.mask[kept], self.offset[kept]
            if self.sampling.temperature > 0:
                self.uniform = self.uniform[kept]
            if going:
                cache.batch_select_indices(kept)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Tokens [B] by inversion of the distribution function, given uniform numbers in [0, 1)."""
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    probability_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        ordered_BV, index_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= sampling.top_p
        probability_BV = probability_BV.masked_fill(outside_BV.scatter(-1, index_BV, outside_BV), 0.0)
    function_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * function_BV[:, -1:]
    return torch.searchsorted(function_BV, target_B1, right=True)[:, 0]
