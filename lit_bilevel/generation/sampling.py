"""Draws one token from logits.

    y_t = F_t⁻¹(u_t)        F_t the distribution function of softmax(z_t / T), cut by top-k and top-p        u_t uniform

Every response has a stream of uniform numbers of its own, seeded by (seed, round, row, sample), so what is sampled
depends on neither the number of processes nor the size of batches (but for ties within rounding), and the random state
of training is not touched.

Left out: beam search and penalties, which sample from another distribution than the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_bilevel.generation.base import Request, Sampling

LIMIT = 1 - 1e-12  # uniforms stay below it, so that rounding never selects past the last possible token


def uniforms(requests: Sequence[Request], steps: int) -> Tensor:
    """The first `steps` uniform numbers of every request's stream, [B, steps], float64, below `LIMIT`."""
    streams = [torch.Generator().manual_seed(request.seed) for request in requests]
    drawn = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
    return torch.stack(drawn).clamp_max(LIMIT)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Tokens [B] by inversion of the distribution function, given uniform numbers in [0, 1)."""
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        floor_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    probability_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1:
        ordered_BV, index_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        # without the token itself: the one that crosses the bound is inside
        outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= sampling.top_p
        probability_BV = probability_BV.masked_fill(outside_BV.scatter(-1, index_BV, outside_BV), 0.0)
    # float64, or tokens of a large vocabulary with small probabilities would be rounded away in the sum
    function_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * function_BV[:, -1:]
    return torch.searchsorted(function_BV, target_B1, right=True)[:, 0]
