"""Token and example losses.

    NLL_k = −log softmax(h_k · Wᵀ / T)[y_k]          ℓ_i = Σ_{k of example i} scale_k · NLL_k          T = 1 to train

With scale 1/length this is the mean NLL per response token, in nats (arXiv 2511.21056).
The output layer is applied to response positions only and, for large vocabularies, in chunks that are recomputed in
the backward pass, so the [K, V] logits never exist as a whole.

Left out: label smoothing and z-loss; they would change what the weights mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_bilevel.types import Batch

CHUNK_ELEMENTS = 1 << 25  # logits held at once: 128 MiB in float32


def _chunk_nll(
    hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor, temperature: float
) -> Tensor:
    return logits_nll(F.linear(hidden_KD, weight_VD, bias_V), target_K, temperature)


def logits_nll(logits_KV: Tensor, target_K: Tensor, temperature: float = 1.0) -> Tensor:
    """NLL of each target, [K], computed in float32 or better."""
    if logits_KV.dtype in (torch.float16, torch.bfloat16):
        logits_KV = logits_KV.float()
    if temperature != 1.0:
        logits_KV = logits_KV / temperature
    return F.cross_entropy(logits_KV, target_K, reduction="none")


def token_nll(
    hidden_KD: Tensor, weight_VD: Tensor, target_K: Tensor, bias_V: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """NLL in nats of each predicted token.

    Args:
        hidden_KD: last hidden states at the positions before the targets.
        weight_VD: the output layer.
        target_K: predicted token ids.
        bias_V: bias of the output layer, if it has one.
        temperature: logits are divided by it.

    Returns:
        [K] losses, differentiable with respect to the hidden states and the output layer.
    """
    rows = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    if len(target_K) <= rows:
        return _chunk_nll(hidden_KD, weight_VD, bias_V, target_K, temperature)
    parts = [
        checkpoint(_chunk_nll, hidden, weight_VD, bias_V, target, temperature, use_reentrant=False)
        for hidden, target in zip(hidden_KD.split(rows), target_K.split(rows), strict=True)
    ]
    return torch.cat(parts)


def example_nll(nll_K: Tensor, batch: Batch) -> Tensor:
    """Loss of each example: ℓ_i = Σ_k scale_k · NLL_k, shape [B]."""
    scaled_K = nll_K * batch.scale_K.to(nll_K.dtype)
    return nll_K.new_zeros(batch.size).index_add(0, batch.segment_K, scaled_K)
