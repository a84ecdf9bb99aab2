"""The socket for generation backends, and the records that go through it.

A backend takes requests and gives one sample for each, in their order:

    Request(prompt_ids=[1, 15, 9], stream=(seed, round, row, sample), max_new_tokens=128)
    Sample(token_ids=[7, 7, 2], finished=True)

Requests are sorted by length and cut into batches under a token budget *before* they are dealt out to processes.
Log-probabilities are not taken from a backend: cached ones differ from the trainer's; see `respond.score`.

Left out: how a token is drawn; `sampling` does that for this package's own decoders, an engine does it by itself.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_bilevel.errors import gather
from lit_bilevel.policy.policy import Policy


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
            raise gather("bad sampling settings", problems)


@dataclass(frozen=True)
class Request:
    """One response to generate.

    Args:
        prompt_ids: token ids of the prompt.
        stream: the key (seed, round, row, sample) of its random numbers.
        max_new_tokens: longest response to this prompt.
        scored: whether log-probabilities of the response are wanted, which takes a pass over it.
    """

    prompt_ids: list[int]
    stream: tuple[int, ...]
    max_new_tokens: int
    scored: bool = True

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


def cut_at_end(token_ids: Sequence[int], end_ids: Sequence[int]) -> Sample:
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


class GenerationBackend(ABC):
    """Makes responses with the current policy; the socket for other engines."""

    @abstractmethod
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], object] | None = None,
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
