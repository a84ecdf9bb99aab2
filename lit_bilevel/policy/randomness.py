"""Repeats dropout's random numbers in all passes of a step over the same rows; the next step draws new ones.

    first pass over a level in a step     draws, and moves the generators on
    every other pass of that step         starts where the first one did; the generators stand afterwards as before

So the generators move by what the first passes draw, whatever a solver asks for. Left out: passes that draw in another
order than the first (fused attention on a GPU has other masks than the attention that forward mode needs); other
accelerators than CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Masks:
    """Lets the passes of one step over one level see the same dropout masks.

    Args:
        device: of the policy.
        drawn: whether a pass draws anything at all.
    """

    def __init__(self, device: torch.device, drawn: bool):
        self.device, self.drawn = device, drawn
        self._first: list[Tensor] | None = None

    @contextmanager
    def same(self) -> Iterator[None]:
        """Around a pass: the masks of the first pass."""
        if not self.drawn:
            yield
        elif self._first is None:
            self._first = _states(self.device)
            yield
        else:
            # put back afterwards: how often a solver looks at rows must not change what is drawn later
            now = _states(self.device)
            _restore(self._first, self.device)
            try:
                yield
            finally:
                _restore(now, self.device)


def part_random_states(process: int) -> None:
    """Give processes that were seeded alike masks of their own; the first one's generators stay as they are."""
    if process > 0:
        torch.manual_seed((int(torch.randint(1 << 62, ())) + process) % (1 << 62))  # CUDA's too


def _states(device: torch.device) -> list[Tensor]:
    """States of the generators that a pass on this device draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
