"""What is asked of generation, and how one token is drawn.

    y_t = F_t⁻¹(u_t)        F_t the distribution function of softmax(z_t / T), cut by top-k and top-p        u_t uniform

Every response has a stream of uniform numbers of its own, seeded by (seed, round, row, sample), so what is sampled
depends on neither the number of processes nor the size of batches (but for ties within rounding), and the random state
of training is not touched.

Left out: beam search and penalties, which sample from another distribution than the policy's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_bilevel.errors import gathered

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


def ended(token_ids: Sequence[int], end_ids: Sequence[int]) -> Sample:
    """A sample cut after its first end token."""
    ids = list(token_ids)
    for position, token in enumerate(ids):
        if token in end_ids:
            return Sample(ids[: position + 1], True)
    return Sample(ids, False)


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


def uniforms(requests: Sequence[Request], steps: int) -> Tensor:
    """The first `steps` uniform numbers of every request's stream, [B, steps], float64, below `LIMIT`."""
    streams = [torch.Generator().manual_seed(request.seed) for request in requests]
    drawn = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
    return torch.stack(drawn).clamp_max(LIMIT)


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
