"""Records that travel between the parts, and the legend of shape suffixes.

Suffixes name the axes of a tensor, one letter an axis:

    B   examples of a batch (each has one data weight)
    S   token sequences of a batch (S = B for offline data; a refined row has several sequences)
    T   tokens of a padded sequence
    K   predicted response tokens of a batch, all sequences one after the other
    N   rows of the pool
    D   hidden size
    V   vocabulary size

Prompt tokens are never predicted, so they have no K entry; that is all that masking needs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

PADDING_ROW = -1


@dataclass(frozen=True)
class Row:
    """One record as the user wrote it: `row` is its position in the source, `id` the user's key."""

    row: int
    id: str
    prompt: str
    response: str
    source: str


@dataclass(frozen=True)
class Example:
    """One row as token ids; tokens from `response_start` on are predicted."""

    row: int
    source: int
    input_ids: list[int]
    response_start: int

    @property
    def response_length(self) -> int:
        """Number of predicted tokens."""
        return len(self.input_ids) - self.response_start


@dataclass(frozen=True)
class Features:
    """What a weighting may look at.

    Args:
        row_B: position of each example in the weight table, int64; `PADDING_ROW` for padding.
        source_B: number of the example's source, int64.
        length_B: number of response tokens.
        loss_B: the example's current loss in nats per token, or `None` where it is not known yet.
    """

    row_B: Tensor
    source_B: Tensor
    length_B: Tensor
    loss_B: Tensor | None = None

    def with_loss(self, loss_B: Tensor) -> Features:
        """The same features, with losses."""
        return replace(self, loss_B=loss_B)


@dataclass  # not frozen: Lightning's `*-true` precisions rebuild it field by field
class Batch:
    """Right-padded token sequences with the response tokens that are predicted, on one device.

    Args:
        row_B: [B] table position of each example; `PADDING_ROW` marks an example that only fills a shape.
        source_B: [B] source number.
        length_B: [B] response tokens of each example.
        input_ids_ST: [S, T] token ids. Causal attention never looks right, so padding needs no mask.
        position_K: [K] flat index into S·T of the token *before* each predicted one.
        target_K: [K] predicted token ids.
        segment_K: [K] the example (0 … B−1) that each predicted token belongs to.
        scale_K: [K] factor of each token's NLL in its example's loss (1/length for a token mean, 0 for padding).
        window_rows: examples in the whole policy step, over all micro-batches and processes, padding not counted.
    """

    row_B: Tensor
    source_B: Tensor
    length_B: Tensor
    input_ids_ST: Tensor
    position_K: Tensor
    target_K: Tensor
    segment_K: Tensor
    scale_K: Tensor
    window_rows: int

    @property
    def size(self) -> int:
        """Number of examples B, padding included."""
        return len(self.row_B)

    @property
    def features(self) -> Features:
        """The features of the examples, without losses."""
        return Features(self.row_B, self.source_B, self.length_B)

    def map(self, function) -> Batch:
        """Apply `function` to every tensor."""
        changed = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "window_rows"}
        return replace(self, **changed)

    def to(self, device: torch.device, **kwargs) -> Batch:
        """Copy to a device; Lightning calls this for every batch."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copy; the data loader calls this when asked to pin memory."""
        return self.map(lambda tensor: tensor.pin_memory())
