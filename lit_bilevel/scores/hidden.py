"""The last hidden state of a row, in a few numbers.

    numbers_i = h_i·G        h_i [D] the state before the last token of the response, G [D, 256] Gaussian

The policy has read the whole row by then: the state knows what kind of text it is, and whether it ends where answers
end. A random projection keeps distances (Johnson and Lindenstrauss, 1984), so a million rows take a gigabyte whatever
the policy's width is; a state of 256 numbers or fewer stays as it is, with zeros behind it.

Left out: the mean over tokens (of a pretrained policy it added nothing to the last one), and states of earlier layers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NUMBERS = 256
"""Numbers of a row."""


def last_states(hidden_KD: Tensor, position_B: Tensor) -> Tensor:
    """[B, NUMBERS] of some rows, float32.

    Args:
        hidden_KD: states before predicted tokens.
        position_B: where each row's last one is among them.
    """
    with torch.autocast(hidden_KD.device.type, enabled=False):  # in 16 bits a row would depend on its batch
        return hidden_KD[position_B].float() @ _matrix(hidden_KD.shape[1]).to(hidden_KD.device)


@functools.lru_cache(maxsize=2)
def _matrix(width: int) -> Tensor:
    # Its type is said, for a run in double precision has another default; the first that asks makes it for all.
    if width <= NUMBERS:
        return torch.eye(width, NUMBERS, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)  # all runs and processes share one projection, whatever their seeds
    return torch.randn(width, NUMBERS, generator=generator, dtype=torch.float32) / NUMBERS**0.5
