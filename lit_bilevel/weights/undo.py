"""Takes back what a step did to the weights, where the policy's own step is skipped.

The weights move before the policy does, and whether the policy's gradient is finite is known only after its backward
pass. So what a step is about to change is copied first: the visited rows of what has an entry for each pool row, and
all of the rest, which is small. For a table of N logits with `ExponentiatedGradient` that is two numbers a visited row
and a dozen scalars, at any N.

Left out: what solvers keep. Their running means are of gradients at the same policy, which stay true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.weights.base import ExampleWeights


class Undo:
    """A copy of all that one step may change of the weights and of their optimizer.

    Args:
        weights: as they are before the step.
        optimizer: theirs, if they have one.
        row_B: [B] the rows that the step visits, at least 0; a row may come twice.
    """

    def __init__(self, weights: ExampleWeights, optimizer: Optimizer | None, row_B: Tensor):
        self._weights, self._optimizer, self._row_B = weights, optimizer, row_B
        self._copies = {
            name: self._copy(tensor, name in weights.by_row) for name, tensor in _tensors_of(weights).items()
        }
        by_row = {parameter for name, parameter in weights.named_parameters() if name in weights.by_row}
        self._states = {
            parameter: {
                name: self._copy_of_state(value, parameter, parameter in by_row) for name, value in state.items()
            }
            for parameter, state in (optimizer.state.items() if optimizer is not None else ())
        }

    @torch.no_grad()
    def take_back(self) -> None:
        """Put everything back as it was, to the last bit."""
        for name, tensor in _tensors_of(self._weights).items():
            self._put_back(tensor, self._copies[name])
        if self._optimizer is None:
            return
        for parameter, state in list(self._optimizer.state.items()):
            if parameter not in self._states:  # its first step made it
                del self._optimizer.state[parameter]
                continue
            for name, copy in self._states[parameter].items():
                if isinstance(copy, _Copy):
                    self._put_back(state[name], copy)
                else:
                    state[name] = copy

    def _copy(self, tensor: Tensor, by_row: bool) -> _Copy:
        tensor = tensor.detach()
        return _Copy(tensor[self._row_B] if by_row else tensor.clone(), by_row)

    def _copy_of_state(self, value: Any, parameter: Tensor, by_row: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self._copy(value, by_row and value.shape == parameter.shape)

    def _put_back(self, tensor: Tensor, copy: _Copy) -> None:
        if copy.by_row:
            tensor[self._row_B] = copy.values
        else:
            tensor.copy_(copy.values)


@dataclass(frozen=True)
class _Copy:
    values: Tensor
    by_row: bool


def _tensors_of(weights: ExampleWeights) -> dict[str, Tensor]:
    return {**dict(weights.named_parameters()), **dict(weights.named_buffers())}
