"""Shards a policy over processes (FSDP2), and gives solvers what they need of a sharded one.

Every decoder layer is a unit, the rest (embeddings, last norm, output layer) another one around them: a unit's
parameters are gathered when it runs and let go afterwards. `Values` are then distributed tensors, so sums and norms
mean the same as on one process.

Forward-mode differentiation gathers the tangents along with the parameters, unit by unit: no process ever holds all
of them. Left out: tensor parallelism, and Hessian-vector products, which FSDP2's hooks do not allow.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_bilevel.policy.policy import Policy
from lit_bilevel.problem import Values, whole

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Slot = tuple[nn.Module, str, Tensor]


def shard(policy: Policy, device: torch.device) -> None:
    """Spread the parameters over all processes, in place."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in policy.layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)  # or a pass without gradients would leave old values


@contextmanager
def carrying(policy: Policy, direction: Values) -> Iterator[None]:
    """While a unit runs, its trainable parameters carry the tangents of `direction`, a list like `policy.trainable()`.

    A policy that is not sharded is one unit. To be entered inside `forward_ad.dual_level()`.
    """
    _load_rules()
    tangents = dict(zip(map(id, policy.trainable()), direction, strict=True))
    handles = []
    units: list[nn.Module] = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units or [policy]:
        slots = [
            (module, name, tangents[id(parameter)])
            for module in _own_modules(unit)
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in tangents
        ]
        handles += _hooks(unit, slots)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def _load_rules() -> None:
    """Let torch load its rules for forward mode, without what it then says of TorchScript, in which it wrote them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its parts, without those that belong to a unit inside."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _hooks(unit: nn.Module, slots: list[Slot]) -> list[RemovableHandle]:
    """Put duals in the place of the gathered parameters (instance attributes hide them), and take them away again."""

    def before(*_: object) -> None:
        for module, name, tangent in slots:
            primal = getattr(module, name).detach()
            module.__dict__[name] = forward_ad.make_dual(primal, whole(tangent).to(primal.dtype))

    def after(*_: object) -> None:
        for module, name, _tangent in slots:
            module.__dict__.pop(name, None)

    return [unit.register_forward_pre_hook(before), unit.register_forward_hook(after, prepend=True, always_call=True)]


def spread(value: Tensor, parameters: Values) -> Tensor:
    """A whole tensor of a parameter's shape as that parameter is spread; any other tensor as it is."""
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.shape == value.shape:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, [Shard(0)])
    return value


def whole_state(model: nn.Module) -> dict[str, Any] | None:
    """The state dict of a sharded model, whole, on the first process; to be called on all of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
