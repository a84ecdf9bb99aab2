"""What a policy step measures on its generated responses: the largest importance ratio, and sums over all of them.

The tallies of micro-batches are merged here, and those of processes are gathered as one tensor each, so that a step has
one exchange for all of it. All numbers stay on the device. Left out: tallies over several steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ResponseTally(NamedTuple):
    """Measured on the generated responses of a policy step: scalars in float64, but for the last.

    Args:
        max_ratio: the largest importance ratio ρ of a token.
        max_row: the row of that token, as the step numbers rows.
        ratio_sum: Σ ρ over tokens.
        tokens: how many there are.
        clipped: how many of them had their ratio clipped.
        weight_sum: Σ r̄ over responses, r̄ the mean weight of a response's tokens.
        weight_square_sum: Σ r̄².
        responses: how many there are.
        singles: [n] sums of what the rule asks for, see `ResponseWeights.singles`.
    """

    max_ratio: Tensor
    max_row: Tensor
    ratio_sum: Tensor
    tokens: Tensor
    clipped: Tensor
    weight_sum: Tensor
    weight_square_sum: Tensor
    responses: Tensor
    singles: Tensor

    @classmethod
    def empty(cls, singles: int, device: torch.device | str = "cpu") -> ResponseTally:
        """That of no responses, for a rule with so many `singles`."""
        return cls.unpack(torch.zeros(8 + singles, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, numbers: Tensor) -> ResponseTally:
        """From the one tensor [8 + n] that `pack` makes."""
        return cls._make([*numbers[:8], numbers[8:]])

    @classmethod
    def over(cls, packed: Tensor) -> ResponseTally:
        """That of all processes, from [processes, 8 + n] of their packed ones."""
        largest = packed[packed[:, 0].argmax(), :2]
        return cls.unpack(torch.cat([largest, packed[:, 2:].sum(0)]))

    def pack(self) -> Tensor:
        """[8 + n] all numbers in one tensor."""
        return torch.cat([torch.stack(self[:8]), self.singles])

    def merge(self, other: ResponseTally) -> ResponseTally:
        """That of the responses of both: the larger ratio with its row, and the sums of all else."""
        larger = other.max_ratio > self.max_ratio
        return ResponseTally(
            torch.where(larger, other.max_ratio, self.max_ratio),
            torch.where(larger, other.max_row, self.max_row),
            *(own + more for own, more in zip(self[2:], other[2:], strict=True)),
        )


def measures(tally: ResponseTally | None) -> dict[str, Tensor]:
    """What is logged of the generated responses of a policy step, of all processes; nothing where there are none."""
    if tally is None:
        return {}
    squares = (tally.weight_square_sum * tally.responses).clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "refine/ratio_mean": tally.ratio_sum / tally.tokens,
        "refine/ratio_max": tally.max_ratio,
        "refine/clipped": tally.clipped / tally.tokens,
        "refine/effective_size": tally.weight_sum**2 / squares,
    }
