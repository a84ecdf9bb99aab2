"""Packs sequences one after the other into few rows, in place of one padded row each.

Every sequence keeps positions of its own, from 0; by these a transformers model sees where it begins and lets no token
look into another one. Rows are filled evenly, the longest sequence first into the emptiest row (Graham 1969, LPT), and
what is left at their ends is padding, each token of which is a sequence of its own.

How long rows are depends on the attention. A kernel for sequences of different lengths (`flash_attention_2`) takes one
row without any padding; the others compute all pairs of tokens of a row, so rows become about as long as the longest
sequence and cost what padded ones do, only fewer. With dropout the masks fall elsewhere than in padded rows. Left out:
packing over the borders of a micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from lit_bilevel.types import Packing


def pack(ids: Sequence[np.ndarray], predicted: Sequence[np.ndarray], least_width: float) -> Packing:
    """The layout of sequences in rows of about `least_width` tokens, or as many as the longest sequence has.

    Args:
        ids: token ids of each sequence.
        predicted: positions in it of the tokens that are predicted, none of them 0.
        least_width: infinite for one row.
    """
    longest = max(len(one) for one in ids)
    rows = max(1, round(sum(len(one) for one in ids) / max(longest, least_width)))
    filled = [(0, row) for row in range(rows)]
    starts = [(0, 0)] * len(ids)
    for number in sorted(range(len(ids)), key=lambda number: -len(ids[number])):
        start, row = heapq.heappop(filled)
        starts[number] = (row, start)
        heapq.heappush(filled, (start + len(ids[number]), row))
    width = max(length for length, _ in filled)
    input_ids, offsets = np.zeros((2, rows, width), dtype=np.int64)
    slots = []
    for one, tokens, (row, start) in zip(ids, predicted, starts, strict=True):
        input_ids[row, start : start + len(one)] = one
        offsets[row, start : start + len(one)] = np.arange(len(one))
        slots.append(row * width + start + tokens - 1)
    return Packing(torch.from_numpy(input_ids), torch.from_numpy(offsets), torch.from_numpy(np.concatenate(slots)))
