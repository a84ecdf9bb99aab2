"""Finds out, by trying, how a causal LM gets from its decoder's last hidden states to its logits.

    z = cap·tanh(scale·(h·Wᵀ + b)/cap), or without cap scale·(h·Wᵀ + b)

Candidates for scale and cap come from the model's configuration (Cohere multiplies by `logit_scale`, Granite divides by
`logits_scaling`, Gemma caps); which of them holds is told by the model itself, on hidden states that are also made
large enough for a cap to bite. Left out: models with other steps in between; the policy uses their own logits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "softcap")
LARGE = 100.0
TOLERANCE = 1e-2  # of the largest logit; bfloat16 keeps three digits


class Shape(NamedTuple):
    """Scale and cap of an output layer."""

    scale: float = 1.0
    cap: float | None = None


def head_shape(model: PreTrainedModel) -> Shape | None:
    """The scale and cap of a model's output layer; `None` where its logits are something else.

    Args:
        model: a transformers causal LM on any device, in any mode.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not hasattr(model, "get_decoder") or head.weight.is_meta:
        return None
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if "flash" in (attention or ""):  # whose kernels are for GPUs, and the model may not be on one yet
        model.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            decoded = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            taken, small, logits = _run(model, head, ids, 1.0)
            if taken is None or not torch.allclose(taken, decoded, rtol=TOLERANCE, atol=TOLERANCE):
                return None
            factor = LARGE / float(small.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
            _, large, large_logits = _run(model, head, ids, factor)
            fitting = (shape for shape in _candidates(model.config) if _holds(shape, small, logits))
            return next((shape for shape in fitting if _holds(shape, large, large_logits)), None)
    finally:
        model.train(training)
        model.config._attn_implementation = attention


def _run(model: PreTrainedModel, head: nn.Linear, ids: Tensor, factor: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """What the output layer was given and gave, and the logits, with its input multiplied by a factor."""
    given: list[Tensor] = []
    handles = [
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor, *inputs[1:])),
        head.register_forward_hook(lambda _module, inputs, output: given.extend((inputs[0], output.clone()))),
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return (given[0], given[1].float(), logits.float()) if len(given) == 2 else (None, logits, logits)


def _candidates(config: PreTrainedConfig) -> list[Shape]:
    scales = [value for name in SCALES if isinstance(value := getattr(config, name, None), int | float) and value]
    caps = [value for name in CAPS if isinstance(value := getattr(config, name, None), int | float) and value]
    every = itertools.product([1.0, *scales, *(1 / scale for scale in scales)], [None, *caps])
    return [Shape(float(scale), cap) for scale, cap in every]


def _holds(shape: Shape, output: Tensor, logits: Tensor) -> bool:
    expected = output * shape.scale
    if shape.cap is not None:
        expected = shape.cap * torch.tanh(expected / shape.cap)
    limit = TOLERANCE * logits.abs().max()
    return bool(limit.isfinite() and (expected - logits).abs().max() <= limit)
