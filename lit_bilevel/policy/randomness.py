"""The random state that dropout draws from, so that passes can be repeated with the same masks.

Left out: other accelerators than CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """States of the generators that a pass on this device draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore_random_states(states: list[Tensor], device: torch.device) -> None:
    """Go back to what `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
