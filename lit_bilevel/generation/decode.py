"""Chooses how a policy is decoded, by trying: each token's logits must be those of one pass over the same ids.

    |logits while decoding − logits of one pass over the row alone|  ≤  tolerance · |logits of two rows differ|

First `decode_shared` is tried, with three short prompts of which one leaves after a token; if that deviates, raises, or
its cache holds more than all keys and values, `decode_padded`, then `decode_unpadded`, then `decode_singly`. A model
for which none is right is refused by name. So a refinement cannot sample from another distribution than the one that
is trained.

Left out: faults that only long sequences show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import Request, Sample, Sampling, cut_at_end
from lit_bilevel.generation.padded import decode_padded, decode_shared
from lit_bilevel.generation.sampling import draw, uniforms
from lit_bilevel.generation.unpadded import decode_singly, decode_unpadded
from lit_bilevel.policy.causal import embeddings_of
from lit_bilevel.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Decoder = Callable[..., list[list[int]]]
EXACT, ROUNDED = 1e-3, 0.2  # tolerances in float32 and above, and below it
LENGTHS, STEPS = (7, 7, 3), (1, 3, 3)  # of the prompts that are tried, and of their answers
BY_LONGEST = ("dynamic", "longrope")  # rotary frequencies that depend on the longest row of a batch


def decode(
    policy: Policy,
    requests: Sequence[Request],
    sampling: Sampling,
    end_ids: Sequence[int],
    progress: Callable[[int], object] | None = None,
) -> list[Sample]:
    """One sample per request, all of them in one batch; the policy in evaluation mode, gradients off.

    Raises:
        UserError: if the policy cannot be decoded.
    """
    model = policy.causal_lm
    limits = [min(request.max_new_tokens, sampling.max_new_tokens) for request in requests]
    prompts = [request.prompt_ids for request in requests]
    decode = decoder_for(policy)
    # beyond that length a row's rotary frequencies would follow the longest row of its batch
    if max(map(len, prompts)) + max(limits) > _alike_up_to(model.config.get_text_config()):
        decode = decode_unpadded
    if sampling.temperature > 0:
        # all numbers of a request at once, from its own stream: what it draws does not depend on who shares its batch
        uniform = uniforms(requests, max(limits)).to(embeddings_of(model).device)

    def choose(row_B: Tensor, step: int, logits_BV: Tensor) -> Tensor:
        if sampling.temperature == 0:
            return logits_BV.argmax(-1)
        return draw(logits_BV, sampling, uniform[row_B, step])

    return [cut_at_end(ids, end_ids) for ids in decode(model, prompts, limits, end_ids, choose, progress)]


def decoder_for(policy: Policy) -> Decoder:
    """The fastest decoder that is right for a policy, found once; the policy in evaluation mode, gradients off.

    Raises:
        UserError: if none is.
    """
    if policy.decoder is None:  # kept with the policy: a round asks once a batch, and trying costs several passes
        model = policy.causal_lm
        # under autocast logits are rounded whatever the parameters are, and two right ways differ by that
        exact = policy.precise and not torch.is_autocast_enabled(embeddings_of(model).device.type)
        tolerance = EXACT if exact else ROUNDED
        for way in (*_padded_ways(model), decode_unpadded, decode_singly):
            if (deviation := _deviation(model, way)) <= tolerance:
                policy.decoder = way
                break
        else:
            raise _undecodable(model, deviation)
    return policy.decoder


def _padded_ways(model: PreTrainedModel) -> list[Decoder]:
    """Those that its cache allows: of all its layers rows can leave, and padding may stand inside of a row."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return []
    # a window counts the padding between a beginning and the rest
    return [decode_padded] if DynamicSlidingWindowLayer in layers else [decode_shared, decode_padded]


def _deviation(model: PreTrainedModel, decode: Decoder) -> float:
    """The largest deviation of logits from those of one pass, as a share of how much rows differ; inf on an error."""
    device = embeddings_of(model).device
    vocabulary = embeddings_of(model).shape[0]
    # not the first ids, which are padding and ends of text in many vocabularies and may be treated apart
    ids = torch.arange(3, 3 + sum(LENGTHS)) % vocabulary
    prompts = [[3, *part[1:].tolist()] for part in ids.split(LENGTHS)]  # of one beginning
    seen: list[tuple[int, int, Tensor]] = []
    given: list[list[int]] = [[] for _ in prompts]

    def choose(row_B: Tensor, step: int, logits_BV: Tensor) -> Tensor:
        seen.extend((row, step, logits_V) for row, logits_V in zip(row_B.tolist(), logits_BV.clone(), strict=True))
        drawn_B = logits_BV.argmax(-1)  # whatever is drawn: both sides are given the same tokens
        for row, token in zip(row_B.tolist(), drawn_B.tolist(), strict=True):
            given[row].append(token)
        return drawn_B

    try:
        decode(model, prompts, STEPS, (), choose)
    except Exception:  # a cache or an argument that the model does not take; each raises what it likes
        return float("inf")

    def alone(row: int, step: int) -> Tensor:
        # one row, no cache, no padding: nothing that a decoder could get wrong has a part in it
        whole = torch.tensor([prompts[row] + given[row][:step]], device=device)
        return model(input_ids=whole, use_cache=False).logits[0, -1].float()

    # logits have no scale of their own, so a deviation is held against what another prompt changes
    effect = (alone(0, 0) - alone(1, 0)).norm()
    worst = max(float((logits_V - alone(row, step)).norm() / effect) for row, step, logits_V in seen)
    return 0.0 if not effect.isfinite() else worst  # a policy of NaN says nothing of the decoder


def _alike_up_to(config: PreTrainedConfig) -> float:
    """Tokens up to which positions mean the same whatever else is in the batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in BY_LONGEST
    ]
    return min(limits, default=float("inf"))


def _undecodable(model: PreTrainedModel, deviation: float) -> UserError:
    import transformers

    how = (
        "ends in an error" if deviation == float("inf") else f"gives other logits (by {deviation:.2g} of their spread)"
    )
    return UserError(
        f"`{type(model).__name__}` under transformers {transformers.__version__} {how} where it generates token by"
        " token, compared with one pass over the same tokens, so its answers would not be the policy's; try another"
        " `model.policy.attn_implementation` or version of transformers, or leave `SelfRefine` and `predict` out."
    )
