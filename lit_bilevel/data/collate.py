"""Collates examples into batches: right padding or packing, and flat indices of the tokens that are predicted.

Offline and generated sequences go into the same batch. The indices are made here, on the CPU, so that the training step
selects response positions without asking the device how many there are. Left out: padding on the left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lit_bilevel.data.packing import pack
from lit_bilevel.types import PADDING_ROW, Batch, Example, Generated, Part, Response


def collate(
    examples: Sequence[Example], window_rows: int, call_cost: float = math.inf, pack_width: float | None = None
) -> Batch:
    """One batch of examples: one sequence each, two of a preference pair, or one per response of a group.

    Args:
        examples: at least one; those with `PADDING_ROW` fill the shape and count nothing.
        window_rows: rows in the whole policy step.
        call_cost: how many tokens' computation one more call of the policy is worth saving.
        pack_width: tokens that a packed row has at least; `None` for padded rows.
    """
    responses = itertools.count()
    sequences = [s for index, example in enumerate(examples) for s in _sequences(example, index, responses)]
    # neighbours are of like length then, which is what `_parts` cuts by
    sequences.sort(key=lambda sequence: len(sequence.ids))
    width = len(sequences[-1].ids)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    every_ids = [np.asarray(sequence.ids, dtype=np.int64) for sequence in sequences]
    predicted = [
        np.concatenate([sequence.earlier, np.arange(sequence.start, len(sequence.ids))]).astype(np.int64)
        for sequence in sequences
    ]
    for ids, row in zip(every_ids, input_ids, strict=True):
        row[: len(ids)] = ids
    lengths = [len(tokens) for tokens in predicted]
    return Batch(
        row_B=torch.tensor([example.row for example in examples]),
        source_B=torch.tensor([example.source for example in examples]),
        length_B=torch.tensor([example.response_length for example in examples]),
        input_ids_ST=torch.from_numpy(input_ids),
        position_K=torch.from_numpy(np.concatenate([t - 1 + index * width for index, t in enumerate(predicted)])),
        target_K=torch.from_numpy(np.concatenate([ids[t] for ids, t in zip(every_ids, predicted, strict=True)])),
        segment_K=torch.from_numpy(np.repeat([sequence.example for sequence in sequences], lengths)),
        scale_K=torch.from_numpy(np.repeat([sequence.scale for sequence in sequences], lengths)),
        parts=tuple(_parts(sequences, call_cost)),
        window_rows=window_rows,
        generated=_collate_generated(examples, sequences),
        packing=None if pack_width is None else pack(every_ids, predicted, pack_width),
        sign_K=_signs(examples, sequences),
    )


def _parts(sequences: list[_Sequence], call_cost: float) -> Iterator[Part]:
    """The cut into neighbours that computes the fewest tokens, calls included (dynamic programming)."""
    lengths = [len(sequence.ids) for sequence in sequences]
    starts, best = [0], [0.0]
    for stop in range(1, len(lengths) + 1):
        first = 0 if math.isinf(call_cost) else stop - 1
        cut = min(range(first + 1), key=lambda start: best[start] + (stop - start) * lengths[stop - 1])
        starts.append(cut)
        best.append(best[cut] + (stop - cut) * lengths[stop - 1] + (0 if math.isinf(call_cost) else call_cost))
    cuts = [len(lengths)]
    while cuts[-1] > 0:
        cuts.append(starts[cuts[-1]])
    for stop, start in reversed(list(itertools.pairwise(cuts))):
        predicted = sum(sequence.predicted for sequence in sequences[start:stop])
        yield Part(start, stop, lengths[stop - 1], predicted)


class _Sequence(NamedTuple):
    """One sequence of a batch; `response`, and its `number` in the batch, are set where it was sampled.

    `sign` is 1 for a chosen and −1 for a rejected answer of a pair, else 0.
    """

    ids: list[int]
    start: int
    example: int
    scale: float
    earlier: Sequence[int] = ()
    response: Response | None = None
    agreement: float = 1.0
    number: int = -1
    sign: int = 0

    @property
    def predicted(self) -> int:
        """How many of its tokens are."""
        return len(self.earlier) + len(self.ids) - self.start


def _sequences(example: Example, index: int, numbers: Iterator[int]) -> Iterator[_Sequence]:
    if example.group is None:
        real = example.row != PADDING_ROW
        sign = int(real and example.rejected_ids is not None)
        scale = 1.0 / example.response_length if real else 0.0
        yield _Sequence(example.input_ids, example.response_start, index, scale, example.earlier, sign=sign)
        if example.rejected_ids is not None:
            yield _Sequence(example.rejected_ids, example.response_start, index, 0.0, sign=-sign)
        return
    responses = example.group.responses
    scale = 1.0 / (len(responses) * example.group.mean_length)  # a constant length, and 1/G′ once
    prompt = example.input_ids
    mean = example.group.mean_agreement
    for response in responses:
        agreement = response.agreement / mean if mean > 0 else 0.0  # none agrees with any: none counts
        ids = prompt + response.token_ids
        yield _Sequence(ids, len(prompt), index, scale, (), response, agreement, next(numbers))


def _signs(examples: Sequence[Example], sequences: list[_Sequence]) -> torch.Tensor | None:
    if all(example.rejected_ids is None for example in examples):
        return None
    lengths = [sequence.predicted for sequence in sequences]
    return torch.from_numpy(np.repeat(np.array([sequence.sign for sequence in sequences], dtype=np.int64), lengths))


def _collate_generated(examples: Sequence[Example], sequences: list[_Sequence]) -> Generated | None:
    groups = [example.group for example in examples if example.group is not None]
    if not groups:
        return None
    lengths = [sequence.predicted for sequence in sequences]
    first = np.cumsum([0, *lengths])
    held = [(index, s, s.response) for index, s in enumerate(sequences) if s.response is not None]
    held.sort(key=lambda item: item[1].number)  # responses in the order of the examples, whatever their length
    return Generated(
        sequence_R=torch.tensor([index for index, _, _ in held]),
        example_R=torch.tensor([sequence.example for _, sequence, _ in held]),
        token_J=torch.from_numpy(np.concatenate([np.arange(first[p], first[p + 1]) for p, _, _ in held])),
        response_J=torch.from_numpy(np.repeat(np.arange(len(held)), [lengths[index] for index, _, _ in held])),
        logprob_J=torch.tensor([p for _, _, response in held for p in response.token_logprobs], dtype=torch.float32),
        temperature=groups[0].temperature,
        agreement_R=torch.tensor([sequence.agreement for _, sequence, _ in held], dtype=torch.float64),
    )


def share_of_rank(examples: list[Example], rank: int, world_size: int) -> list[Example]:
    """This process's part of a global window: sorted by length and dealt out, the same count on every rank."""
    # every process gets short and long rows alike, or all would wait for the one with the longest
    ordered = sorted(examples, key=lambda example: (len(example.input_ids), example.row))
    each = -(-len(ordered) // world_size)
    mine = ordered[rank::world_size]
    return mine + [replace(ordered[0], row=PADDING_ROW)] * (each - len(mine))
