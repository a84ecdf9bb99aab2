"""Token and example losses.

    NLL_k = −log softmax(z_k / T)[y_k]      z_k = cap·tanh(scale·(h_k·Wᵀ + b)/cap), or without cap scale·(h_k·Wᵀ + b)
    ℓ_i = Σ_{k of example i} scale_k · NLL_k                                                     T = 1 to train

With scale_k = 1/length this is the mean NLL per response token, in nats (arXiv 2511.21056).
The output layer is applied to response positions only and, for large vocabularies, in chunks whose logits are computed
again in the backward pass, so the [K, V] logits never exist as a whole. Torch 2.13 has `linear_cross_entropy` for this,
with as much time and memory, but it rounds losses to bfloat16 where the model is, and silently returns no tangent in
forward mode and no graph for second derivatives; here all three are exact, on every torch.

Left out: label smoothing and z-loss; they would change what the weights mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_bilevel.types import Batch

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in float32


@dataclass(frozen=True)
class OutputLayer:
    """From the last hidden states to logits.

    Args:
        weight_VD: the matrix.
        bias_V: the bias, if there is one.
        scale: factor on the logits.
        cap: c of the soft cap c·tanh(·/c), if there is one.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """[K, V] logits in float32 or better."""
        logits_KV = _precise(F.linear(hidden_KD, self.weight_VD, self.bias_V))
        if self.scale != 1.0:
            logits_KV = logits_KV * self.scale
        return logits_KV if self.cap is None else self.cap * torch.tanh(logits_KV / self.cap)

    def slope(self, logits_KV: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to h·Wᵀ + b, given the logits."""
        return self.scale if self.cap is None else self.scale * (1 - (logits_KV / self.cap) ** 2)


def logits_nll(logits_KV: Tensor, target_K: Tensor, temperature: float = 1.0) -> Tensor:
    """NLL of each target, [K], computed in float32 or better."""
    logits_KV = _precise(logits_KV)
    if temperature != 1.0:
        logits_KV = logits_KV / temperature
    return F.cross_entropy(logits_KV, target_K, reduction="none")


def token_nll(hidden_KD: Tensor, layer: OutputLayer, target_K: Tensor, temperature: float = 1.0) -> Tensor:
    """NLL in nats of each predicted token.

    Args:
        hidden_KD: last hidden states at the positions before the targets.
        layer: the output layer.
        target_K: predicted token ids.
        temperature: logits are divided by it.

    Returns:
        [K] losses in float32 or better, differentiable with respect to the hidden states and the output layer, twice
        and in forward mode too (forward mode without recording a graph).
    """
    rows = max(1, CHUNK_ELEMENTS // layer.weight_VD.shape[0])
    if len(target_K) <= rows:
        return logits_nll(layer.logits(hidden_KD), target_K, temperature)
    if not torch.is_grad_enabled():
        return torch.cat(
            [
                logits_nll(layer.logits(hidden), target, temperature)
                for hidden, target in zip(hidden_KD.split(rows), target_K.split(rows), strict=True)
            ]
        )
    device = hidden_KD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        bias_V = None if layer.bias_V is None else layer.bias_V.to(dtype)
        hidden_KD, layer = hidden_KD.to(dtype), replace(layer, weight_VD=layer.weight_VD.to(dtype), bias_V=bias_V)
    return _ChunkedNLL.apply(hidden_KD, layer.weight_VD, layer.bias_V, layer, target_K, temperature, rows)


def token_nll_and_entropy(hidden_KD: Tensor, layer: OutputLayer, target_K: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each predicted token, and the entropy of the prediction, in nats and without a graph.

    Args:
        hidden_KD: last hidden states at the positions before the targets.
        layer: the output layer.
        target_K: predicted token ids.

    Returns:
        Two tensors [K] in float32 or better: −log p(y_k) and −Σ_v p_v log p_v.
    """
    rows = max(1, CHUNK_ELEMENTS // (4 * layer.weight_VD.shape[0]))  # four tensors of a chunk are held at once
    with torch.no_grad():
        chunks = [
            logits_nll_and_entropy(layer.logits(hidden), target)
            for hidden, target in zip(hidden_KD.split(rows), target_K.split(rows), strict=True)
        ]
    nll, entropy = zip(*chunks, strict=True)
    return torch.cat(nll), torch.cat(entropy)


def logits_nll_and_entropy(logits_KV: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each target and entropy of the prediction, [K] each, computed in float32 or better."""
    logprob_KV = _precise(logits_KV).log_softmax(1)
    nll_K = -logprob_KV.gather(1, target_K[:, None])[:, 0]
    probability_KV = logprob_KV.exp()
    logprob_KV.clamp_min_(torch.finfo(logprob_KV.dtype).min)  # 0·log 0 = 0
    return nll_K, -torch.linalg.vecdot(probability_KV, logprob_KV)


class _ChunkedNLL(torch.autograd.Function):
    """NLL [K] that keeps the log-partition of every token instead of its logits."""

    @staticmethod
    def forward(ctx: Any, hidden_KD, weight_VD, bias_V, layer, target_K, temperature, rows):
        ctx.scale, ctx.cap, ctx.temperature, ctx.rows = layer.scale, layer.cap, temperature, rows
        layer = replace(layer, weight_VD=weight_VD, bias_V=bias_V)
        partitions, losses = [], []
        with torch.autocast(hidden_KD.device.type, enabled=False):
            for hidden, target in zip(hidden_KD.split(rows), target_K.split(rows), strict=True):
                logits = _temper_(layer.logits(hidden), temperature)
                partitions.append(logits.logsumexp(1))
                losses.append(partitions[-1] - logits.gather(1, target[:, None])[:, 0])
        ctx.save_for_backward(hidden_KD, weight_VD, bias_V, target_K, torch.cat(partitions))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, slope_K: Any) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, bias_V, target_K, partition_K = ctx.saved_tensors
        layer = OutputLayer(weight_VD, bias_V, ctx.scale, ctx.cap)
        if torch.is_grad_enabled():  # the gradient will be differentiated: with a graph, and all logits
            nll_K = logits_nll(layer.logits(hidden_KD), target_K, ctx.temperature)
            inputs = [
                x for x, needed in zip((hidden_KD, weight_VD, bias_V), ctx.needs_input_grad, strict=False) if needed
            ]
            gradients = iter(torch.autograd.grad(nll_K, inputs, slope_K, create_graph=True))
            return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None
        hidden_slope, weight_slope, bias_slope = (
            torch.zeros_like(x, dtype=_precise(x.new_empty(0)).dtype) if needed else None
            for x, needed in zip((hidden_KD, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        )
        for start in range(0, len(target_K), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = layer.logits(hidden_KD[chunk])
            slope = layer.slope(logits) * (slope_K[chunk, None] / ctx.temperature)
            slope_KV = _temper_(logits, ctx.temperature).sub_(partition_K[chunk, None]).exp_()
            slope_KV.scatter_add_(1, target_K[chunk, None], torch.full_like(slope_KV[:, :1], -1.0))
            slope_KV = slope_KV.mul_(slope).to(hidden_KD.dtype)
            if hidden_slope is not None:
                hidden_slope[chunk] = slope_KV @ weight_VD
            if weight_slope is not None and weight_slope.dtype == slope_KV.dtype:
                weight_slope.addmm_(slope_KV.T, hidden_KD[chunk])  # needs no second [V, D]
            elif weight_slope is not None:
                weight_slope += slope_KV.T @ hidden_KD[chunk]
            if bias_slope is not None:
                bias_slope += slope_KV.sum(0)
        pairs = zip((hidden_slope, weight_slope, bias_slope), (hidden_KD, weight_VD, bias_V), strict=True)
        return *(None if slope is None else slope.to(x.dtype) for slope, x in pairs), None, None, None, None


def _temper_(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature, in place."""
    return logits if temperature == 1.0 else logits.div_(temperature)


def _precise(tensor: Tensor) -> Tensor:
    """In float32 where it is in fewer bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def example_nll(nll_K: Tensor, batch: Batch) -> Tensor:
    """Loss of each example: ℓ_i = Σ_k scale_k · NLL_k, shape [B]."""
    scaled_K = nll_K * batch.scale_K.to(nll_K.dtype)
    return nll_K.new_zeros(batch.size).index_add(0, batch.segment_K, scaled_K)
