"""Examples to batches: right padding, and flat indices of the tokens that are predicted.

Offline and generated sequences go into the same batch. The indices are made here, on the CPU, so that the training step
selects response positions without asking the device how many there are. Left out: packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lit_bilevel.types import PADDING_ROW, Batch, Example, Generated, Response


def collate(examples: Sequence[Example], window_rows: int) -> Batch:
    """One batch of examples: one sequence each, or one per response where an example has a group.

    Args:
        examples: at least one; those with `PADDING_ROW` fill the shape and count nothing.
        window_rows: rows in the whole policy step.
    """
    sequences = [sequence for index, example in enumerate(examples) for sequence in _sequences(example, index)]
    width = max(len(sequence.ids) for sequence in sequences)
    input_ids = np.zeros((len(sequences), width), dtype=np.int64)
    positions, targets, segments, scales = [], [], [], []
    for place, sequence in enumerate(sequences):
        ids = np.asarray(sequence.ids, dtype=np.int64)
        input_ids[place, : len(ids)] = ids
        positions.append(np.arange(sequence.start - 1, len(ids) - 1) + place * width)
        targets.append(ids[sequence.start :])
        segments.append(np.full(len(ids) - sequence.start, sequence.example))
        scales.append(np.full(len(ids) - sequence.start, sequence.scale))
    return Batch(
        row_B=torch.tensor([example.row for example in examples]),
        source_B=torch.tensor([example.source for example in examples]),
        length_B=torch.tensor([example.response_length for example in examples]),
        input_ids_ST=torch.from_numpy(input_ids),
        position_K=torch.from_numpy(np.concatenate(positions)),
        target_K=torch.from_numpy(np.concatenate(targets)),
        segment_K=torch.from_numpy(np.concatenate(segments)),
        scale_K=torch.from_numpy(np.concatenate(scales)),
        window_rows=window_rows,
        generated=_generated(examples, sequences),
    )


class _Sequence(NamedTuple):
    """One sequence of a batch; `response` is set where it was sampled."""

    ids: list[int]
    start: int
    example: int
    scale: float
    response: Response | None


def _sequences(example: Example, index: int) -> Iterator[_Sequence]:
    if example.group is None:
        scale = 0.0 if example.row == PADDING_ROW else 1.0 / example.response_length
        yield _Sequence(example.input_ids, example.response_start, index, scale, None)
        return
    responses = example.group.responses
    scale = 1.0 / (len(responses) * example.group.mean_length)  # a constant length, and 1/G′ once
    for response in responses:
        yield _Sequence(example.input_ids + response.token_ids, len(example.input_ids), index, scale, response)


def _generated(examples: Sequence[Example], sequences: list[_Sequence]) -> Generated | None:
    groups = [example.group for example in examples if example.group is not None]
    if not groups:
        return None
    lengths = [len(sequence.ids) - sequence.start for sequence in sequences]
    first = np.cumsum([0, *lengths])
    held = [(place, s, s.response) for place, s in enumerate(sequences) if s.response is not None]
    return Generated(
        sequence_R=torch.tensor([place for place, _, _ in held]),
        example_R=torch.tensor([sequence.example for _, sequence, _ in held]),
        token_J=torch.from_numpy(np.concatenate([np.arange(first[p], first[p + 1]) for p, _, _ in held])),
        response_J=torch.from_numpy(np.repeat(np.arange(len(held)), [lengths[place] for place, _, _ in held])),
        logprob_J=torch.tensor([p for _, _, response in held for p in response.token_logprobs]),
        temperature=groups[0].temperature,
    )


def share_of_rank(examples: list[Example], rank: int, world_size: int) -> list[Example]:
    """This process's part of a global window: sorted by length and dealt out, the same count on every rank."""
    ordered = sorted(examples, key=lambda example: (len(example.input_ids), example.row))
    each = -(-len(ordered) // world_size)
    mine = ordered[rank::world_size]
    return mine + [replace(ordered[0], row=PADDING_ROW)] * (each - len(mine))
