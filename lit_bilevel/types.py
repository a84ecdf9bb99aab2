"""Records that travel between the parts, and the legend of shape suffixes.

Suffixes name the axes of a tensor, one letter an axis:

    B   examples of a batch (each has one data weight)
    S   token sequences of a batch (S = B for offline data; a preference pair has two, a refined row several)
    T   tokens of a padded sequence
    K   predicted response tokens of a batch, all sequences one after the other
    P   rows of packed sequences
    W   tokens of such a row
    R   generated responses of a batch (each is one of its S sequences)
    J   tokens of generated responses (some of the K)
    N   rows of the pool
    D   hidden size
    V   vocabulary size

Prompt tokens are never predicted, so they have no K entry; that is all that masking needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

PADDING_ROW = -1


@dataclass(frozen=True)
class Row:
    """One record as the user wrote it: the last question and its answer, and the turns before them.

    Args:
        row: its position in the source.
        id: the user's key.
        prompt: the last user turn; empty for plain text, all of which is learned.
        response: the last assistant turn.
        source: where the row comes from, by the user's name.
        history: the turns before the prompt, as (role, content), a system turn included.
        place: file and line, for messages.
        rejected: of a preference pair whose both answers are asked for, the other one.
        details: the whole conversation as JSON (`messages`, `learned`, `tools`), where role and text are not all of it.
    """

    row: int
    id: str
    prompt: str
    response: str
    source: str
    history: tuple[tuple[str, str], ...] = ()
    place: str = field(default="", compare=False)
    rejected: str | None = None
    details: str = ""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All turns up to the prompt, as (role, content)."""
        return (*self.history, ("user", self.prompt)) if self.prompt else ()


@dataclass(frozen=True)
class Response:
    """One sampled response: the ids as they were drawn, and what the policy that drew them gave each of them.

    Args:
        token_ids: sampled ids, the end-of-sequence token included if it was drawn.
        token_logprobs: log-probability of each at the sampling temperature; empty where they were not wanted.
        finished: whether the response ended by itself.
        agreement: share of the other responses to its question that say the same.
    """

    token_ids: list[int]
    token_logprobs: list[float]
    finished: bool
    agreement: float = 1.0


@dataclass(frozen=True)
class Group:
    """The responses that stand in for a row's own: ℓ̃ = (1/G′)·Σ_g Σ_t r_gt·NLL_gt / L̄.

    Args:
        responses: G′ responses, at least one.
        mean_length: L̄, the mean length in tokens of the usable responses of their round.
        temperature: at which they were sampled.
        mean_agreement: the mean of their `agreement` over the usable responses of their round.
    """

    responses: tuple[Response, ...]
    mean_length: float
    temperature: float
    mean_agreement: float = 1.0


@dataclass(frozen=True)
class Example:
    """One row as token ids; tokens from `response_start` on are predicted, and those at the positions `earlier`.

    With a `group`, `input_ids` is the prompt alone and the example has as many sequences as the group has responses.
    With `rejected_ids` it is a preference pair of two sequences, whose prompts are the same.
    """

    row: int
    source: int
    input_ids: list[int]
    response_start: int
    group: Group | None = None
    earlier: list[int] = field(default_factory=list)
    rejected_ids: list[int] | None = None

    @property
    def response_length(self) -> int:
        """Number of predicted tokens; of a pair, those of the chosen answer; of a group, the mean, rounded."""
        if self.group is None:
            return len(self.earlier) + len(self.input_ids) - self.response_start
        lengths = [len(response.token_ids) for response in self.group.responses]
        return round(sum(lengths) / len(lengths))


class Question(NamedTuple):
    """A prompt to answer: its position, id and text, and its token ids."""

    row: int
    id: str
    prompt: str
    prompt_ids: list[int]


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


@dataclass(frozen=True)
class Generated:
    """What is known about the generated responses of a batch.

    Args:
        sequence_R: [R] the sequence (0 … S−1) that holds each response.
        example_R: [R] the example (0 … B−1) that each belongs to.
        token_J: [J] index (0 … K−1) of each generated token among the predicted ones.
        response_J: [J] the response (0 … R−1) of each generated token.
        logprob_J: [J] behaviour log-probabilities: those of the policy that sampled, at the sampling temperature.
        temperature: the sampling temperature.
        agreement_R: [R] how far each response agrees with the others to its question, by the mean of its round.
    """

    sequence_R: Tensor
    example_R: Tensor
    token_J: Tensor
    response_J: Tensor
    logprob_J: Tensor
    temperature: float
    agreement_R: Tensor


class Part(NamedTuple):
    """Neighbouring sequences that go through the policy in one call, cut to their own width.

    Args:
        start: the first of them.
        stop: after the last.
        width: tokens of the longest.
        predicted: how many of the K tokens they hold.
    """

    start: int
    stop: int
    width: int
    predicted: int


@dataclass(frozen=True)
class Packing:
    """The sequences of a batch in fewer, fuller rows, several in each.

    Args:
        input_ids_PW: [P, W] token ids.
        offset_PW: [P, W] position of each token in its own sequence; 0 for padding at the ends of rows.
        position_K: [K] flat index into P·W of the token before each predicted one.
    """

    input_ids_PW: Tensor
    offset_PW: Tensor
    position_K: Tensor


@dataclass(frozen=True)
class Batch:
    """Right-padded token sequences with the response tokens that are predicted, on one device.

    Args:
        row_B: [B] table position of each example; `PADDING_ROW` marks an example that only fills a shape.
        source_B: [B] source number.
        length_B: [B] response tokens of each example (of a pair, of its chosen answer).
        input_ids_ST: [S, T] token ids. Causal attention never looks right, so padding needs no mask.
        position_K: [K] flat index into S·T of the token *before* each predicted one.
        target_K: [K] predicted token ids.
        segment_K: [K] the example (0 … B−1) that each predicted token belongs to.
        scale_K: [K] factor of each token's NLL in its example's loss (1/length for a token mean, 0 for padding).
        parts: the sequences, sorted by length, as they go through the policy: one call a part, to compute little
            padding.
        window_rows: rows in the whole policy step, over all micro-batches and processes, padding not counted.
        generated: which of the sequences were sampled from the policy, or `None` where all are offline data.
        packing: the same sequences as they go through the policy instead of the parts, or `None`.
        sign_K: [K] of preference pairs, 1 for tokens of a chosen answer (their scale is 1/length), −1 for those of a
            rejected one (their scale is 0), 0 for padding; `None` where there are none.
        reference_K: [K] NLL of each predicted token under the reference, where an objective asked for it.
    """

    row_B: Tensor
    source_B: Tensor
    length_B: Tensor
    input_ids_ST: Tensor
    position_K: Tensor
    target_K: Tensor
    segment_K: Tensor
    scale_K: Tensor
    parts: tuple[Part, ...]
    window_rows: int
    generated: Generated | None = None
    packing: Packing | None = None
    sign_K: Tensor | None = None
    reference_K: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples B, padding included."""
        return len(self.row_B)

    @property
    def computed_tokens(self) -> int:
        """Tokens that a pass of the policy computes, padding included."""
        if self.packing is not None:
            return self.packing.input_ids_PW.numel()
        return sum((part.stop - part.start) * part.width for part in self.parts)

    @property
    def features(self) -> Features:
        """The features of the examples, without losses."""
        return Features(self.row_B, self.source_B, self.length_B)

    def map(self, function) -> Batch:
        """Apply `function` to every tensor."""
        return _map(self, function)

    def to(self, device: torch.device, **kwargs) -> Batch:
        """Copy to a device; Lightning calls this for every batch."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copy, for quick transfer."""
        return self.map(lambda tensor: tensor.pin_memory())


def _map(record: Any, function) -> Any:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
    records = {n: _map(value, function) for n, value in values.items() if isinstance(value, Generated | Packing)}
    return replace(record, **tensors, **records)
