"""Generates G answers of the current policy to each of some questions, the same on every process.

    questions of the pool and of the monitor → requests, each with random numbers of its own → batches, dealt out →
    responses with their log-probabilities, gathered

Left out: what becomes of them; `SelfRefine` says that.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from lit_bilevel.callbacks.progress import GenerationBar
from lit_bilevel.generation.base import GenerationBackend, Request, Sampling
from lit_bilevel.generation.ending import end_tokens
from lit_bilevel.generation.respond import gather_responses, respond
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.context import context_of, room
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.types import Response

MARKS = {"pool": (), "monitor": (1,)}
"""What the key of random numbers ends with, so that rows of like number in two sets do not share them."""


def answer_anew(
    trainer: Trainer,
    module: LitBilevel,
    backend: GenerationBackend,
    sampling: Sampling,
    wanted: dict[str, Sequence[int]],
    count: int,
    round: int,
) -> dict[str, dict[int, list[Response]]]:
    """All responses to every question, by set and row.

    Args:
        trainer: in a fit.
        module: with its policy.
        backend: what generates.
        sampling: how.
        wanted: rows by the name of their set, `pool` or `monitor`.
        count: G, responses of a row.
        round: number of the round, for the random numbers.

    Raises:
        UserError: where the backend refuses its settings.
        GenerationFailed: if any process failed otherwise; on all of them alike.
    """
    requests = [
        r for name, rows in wanted.items() for r in _requests(trainer, module, sampling, name, rows, count, round)
    ]
    answers = iter(_generate(trainer, module, backend, sampling, requests))
    return {name: {row: [next(answers) for _ in range(count)] for row in rows} for name, rows in wanted.items()}


def _requests(
    trainer: Trainer, module: LitBilevel, sampling: Sampling, name: str, rows: Sequence[int], count: int, round: int
) -> list[Request]:
    data = data_of(trainer)
    context = context_of(policy_of(module).causal_lm.config)
    table = data.sets[name].select_columns(["row", "input_ids", "response_start"])[list(rows)]
    requests = []
    for number, ids, start in zip(*(table[column] for column in table), strict=True):
        own = room(context, start, min(sampling.max_new_tokens, data.max_length - start))
        for sample in range(count):  # there is room: the whole row was found to fit
            stream = (data.seed, round, number, sample, *MARKS[name])
            requests.append(Request(ids[:start], stream, own, scored=name == "pool"))  # only these are trained on
    return requests


def _generate(
    trainer: Trainer, module: LitBilevel, backend: GenerationBackend, sampling: Sampling, requests: list[Request]
) -> list[Response]:
    """Responses in the order of the requests; batches are dealt out to the processes."""
    policy = policy_of(module)
    ends = end_tokens(policy, module.tokenizer)
    batches = backend.batches(requests)
    rank, world = trainer.global_rank, trainer.world_size
    with (
        trainer.precision_plugin.forward_context(),
        GenerationBar(trainer, sum(map(len, batches[rank::world]))) as bar,
    ):

        def work(batch: list[int]) -> list[Response]:
            own = [requests[i] for i in batch]
            responses = respond(backend, policy, own, sampling, ends, module.device, bar.tokens)
            bar.responses(len(batch))
            return responses

        return gather_responses(work, batches, rank, world)
