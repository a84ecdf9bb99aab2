"""Generates and scores responses, and survives out-of-memory errors and failures on any process.

A batch that does not fit into memory is halved and tried again, down to single requests; what is sampled does not
change, as every response has random numbers of its own. Any other error on one process becomes `GenerationFailed` on
all of them, so that none waits for the rest. Left out: restarting a backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.data.collate import collate
from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import GenerationBackend, Request, Sample, Sampling, batches_by_length
from lit_bilevel.policy.logprobs import response_logprobs
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Example, Group, Response

log = logging.getLogger(__name__)
Numbered = list[tuple[int, Response]]
SCORED_TOKENS = 1 << 14  # of a pass that scores, as many as `HFGenerate` generates at once
MEMORY_MESSAGES = ("out of memory", "can't allocate memory")


class GenerationFailed(RuntimeError):
    """A backend failed on some process; the message says how."""


def score(
    policy: Policy, requests: Sequence[Request], samples: Sequence[Sample], temperature: float, device: torch.device
) -> list[Response]:
    """Responses with their behaviour log-probabilities, by the pass that training uses, some rows at a time; without
    those that are not wanted. Equal answers to one question are passed once.
    """
    examples = []
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # of each different answer that is wanted
    alike: dict[int, int] = {}
    for i, (request, sample) in enumerate(zip(requests, samples, strict=True)):
        if request.scored:
            alike[i] = first.setdefault((tuple(request.prompt_ids), tuple(sample.token_ids)), i)
        unscored = Response(sample.token_ids, [0.0] * len(sample.token_ids), sample.finished)
        group = Group((unscored,), 1.0, temperature)
        examples.append(Example(0, 0, request.prompt_ids, len(request.prompt_ids), group))
    logprobs: dict[int, list[float]] = {}
    wanted = list(first.values())
    # not the numbers that decoding had: through a cache they differ from those of training, and an unchanged policy
    # would not have ratios of 1
    for places in batches_by_length([requests[i] for i in wanted], SCORED_TOKENS):
        chosen = [wanted[place] for place in places]
        batch = collate([examples[i] for i in chosen], len(chosen)).to(device)
        lengths = [len(samples[i].token_ids) for i in chosen]
        parts = response_logprobs(policy, batch).float().cpu().split(lengths)
        logprobs |= {i: part.tolist() for i, part in zip(chosen, parts, strict=True)}
    scored = [logprobs[alike[i]] if i in alike else [] for i in range(len(samples))]
    return [Response(x.token_ids, own, x.finished) for x, own in zip(samples, scored, strict=True)]


def respond(
    backend: GenerationBackend,
    policy: Policy,
    requests: Sequence[Request],
    sampling: Sampling,
    end_ids: Sequence[int],
    device: torch.device,
    progress: Callable[[int], object] | None = None,
) -> list[Response]:
    """Generate and score one batch, in halves where it does not fit into memory.

    Args:
        backend: what generates.
        policy: the unwrapped policy.
        requests: what to generate.
        sampling: how.
        end_ids: tokens that end a response.
        device: of the policy.
        progress: told the number of new tokens now and then.
    """
    try:
        samples = backend.generate(policy, requests, sampling, end_ids, progress)
        return score(policy, requests, samples, sampling.temperature or 1.0, device)
    except Exception as error:
        if len(requests) < 2 or not _is_memory(error):
            raise
    # outside of the handler, whose traceback still holds the tensors that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(requests) // 2
    rank_zero_warn(f"generation ran out of memory with {len(requests)} responses at once; it goes on with {half}.")
    parts = (requests[:half], requests[half:])
    return [r for part in parts for r in respond(backend, policy, part, sampling, end_ids, device, progress)]


def gather_responses(
    work: Callable[[list[int]], list[Response]], batches: Sequence[list[int]], rank: int, world_size: int
) -> list[Response]:
    """Responses in the order of the requests; batches are dealt out to the processes.

    Args:
        work: responses to the requests with these indices.
        batches: indices of requests.
        rank: this process.
        world_size: number of processes.

    Raises:
        UserError: where a backend refuses its settings.
        GenerationFailed: if any process failed otherwise; on all of them alike.
    """
    answers: Numbered = []
    failure: tuple[bool, str] | None = None
    try:
        for batch in batches[rank::world_size]:
            answers += zip(batch, work(batch), strict=True)
    except Exception as error:
        mistake = isinstance(error, UserError)
        failure = (mistake, str(error) if mistake else _describe(error))
        if not mistake:
            log.warning("generation failed", exc_info=error)  # the run may go on, but where it failed must be known
    # also where this process failed: the others wait for it here
    parts: list[tuple[Numbered, tuple[bool, str] | None]] = [(answers, failure)] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(parts, (answers, failure))
    for process, (_, failed) in enumerate(parts):
        if failed is not None:
            mistake, text = failed
            raise UserError(text) if mistake else GenerationFailed(f"{text}, on process {process}")
    # by request again: what is stored must not depend on how many processes shared the work
    pairs = sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])
    return [response for _, response in pairs]


def _is_memory(error: Exception) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES))


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
