"""Evaluates a policy in float32 arithmetic, whatever precision it is trained in.

    values   as they are; those of fewer bits (`bf16-true`, a bfloat16 or float16 base) are widened while they are used
    sums     in float32: no autocast, no TF32, 4-bit matrices unpacked to float32, no attention that takes 16 bits only

In 16 bits the log-probability of a token depends on what else is in its batch, for kernels add up in an order that
depends on shapes: by 7 to 10 % between two shapes. In float32 that is 1e-5. Decoder layers are widened one at a time,
so the memory for it is that of one layer, of the embeddings and of the output layer.

Left out: 8-bit bases, whose kernels round activations; parameters that are spread over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_bilevel.policy.policy import Policy

Kept = list[tuple[Tensor, Tensor]]


@contextmanager
def in_float32(policy: Policy) -> Iterator[None]:
    """Evaluate the policy in float32 (in float64 where its values are), without a graph; all comes back afterwards."""
    layers = policy.layers()
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(next(policy.parameters()).device.type, enabled=False))
        stack.enter_context(_highest_precision())
        stack.enter_context(_attention_of_any_dtype(policy))
        stack.enter_context(_unpacked_to_float32(policy))
        kept = _widen(tensor for tensor in _tensors(policy) if id(tensor) not in inside)
        stack.callback(_narrow, kept)
        for layer in layers:
            if any(_is_narrow(tensor) for tensor in _tensors(layer)):
                _widen_while_it_runs(layer, stack)
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_narrow(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter)  # packed matrices have types of their own
    return plain and tensor.dtype in (torch.bfloat16, torch.float16)


def _widen(tensors: Iterable[Tensor]) -> Kept:
    kept = [(tensor, tensor.data) for tensor in tensors if _is_narrow(tensor)]
    for tensor, data in kept:
        tensor.data = data.float()
    return kept


def _narrow(kept: Kept) -> None:
    for tensor, data in kept:
        tensor.data = data
    kept.clear()


def _widen_while_it_runs(layer: nn.Module, stack: ExitStack) -> None:
    kept: Kept = []

    def before(*_: object) -> None:
        kept.extend(_widen(_tensors(layer)))

    def after(*_: object) -> None:
        _narrow(kept)

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)


@contextmanager
def _highest_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _attention_of_any_dtype(policy: Policy) -> Iterator[None]:
    """Not flash attention, which takes 16 bits only; scored sequences are padded, so others do."""
    config, before = policy.causal_lm.config, policy.causal_lm.config._attn_implementation
    if "flash" in (before or ""):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def _unpacked_to_float32(policy: Policy) -> Iterator[None]:
    """Let 4-bit matrices (of bitsandbytes) be multiplied in float32; their values are the same in any case."""
    packed: list[Any] = [module for module in policy.modules() if type(module).__name__ == "Linear4bit"]
    before = [module.compute_dtype for module in packed]
    for module in packed:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for module, dtype in zip(packed, before, strict=True):
            module.compute_dtype = dtype
