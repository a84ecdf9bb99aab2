"""Examples to batches: right padding, and flat indices of the tokens that are predicted.

The indices are made here, on the CPU, so that the training step selects response positions without asking the device
how many there are. Left out: packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lit_bilevel.types import PADDING_ROW, Batch, Example


def collate(examples: Sequence[Example], window_rows: int) -> Batch:
    """One batch of examples, one sequence each.

    Args:
        examples: at least one; those with `PADDING_ROW` fill the shape and count nothing.
        window_rows: examples in the whole policy step.
    """
    lengths = [len(example.input_ids) for example in examples]
    width = max(lengths)
    input_ids = np.zeros((len(examples), width), dtype=np.int64)
    positions, targets, segments, scales = [], [], [], []
    for index, example in enumerate(examples):
        ids = np.asarray(example.input_ids, dtype=np.int64)
        input_ids[index, : len(ids)] = ids
        start, length = example.response_start, example.response_length
        positions.append(np.arange(start - 1, len(ids) - 1) + index * width)
        targets.append(ids[start:])
        segments.append(np.full(length, index))
        scales.append(np.full(length, 0.0 if example.row == PADDING_ROW else 1.0 / length))
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
    )


def share_of_rank(examples: list[Example], rank: int, world_size: int) -> list[Example]:
    """This process's part of a global window: sorted by length and dealt out, the same count on every rank."""
    ordered = sorted(examples, key=lambda example: (len(example.input_ids), example.row))
    each = -(-len(ordered) // world_size)
    mine = ordered[rank::world_size]
    return mine + [replace(ordered[0], row=PADDING_ROW)] * (each - len(mine))


def micro_batches(examples: list[Example], size: int, window_rows: int) -> list[Batch]:
    """Batches of at most `size` examples, those of like length together."""
    return [collate(examples[i : i + size], window_rows) for i in range(0, len(examples), size)]
