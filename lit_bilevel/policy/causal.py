"""Checks that a model is causal: each token's prediction sees earlier tokens only.

    logits at t of y_1 … y_T  =  logits at t of y_1 … y_t        tried on a few tokens when the model is loaded

Encoders such as BERT can be loaded as causal models and are not; under teacher forcing they would read the answer.
Sequences are padded on the right, so this is also why padding changes nothing.

Left out: models that look ahead over long distances only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lit_bilevel.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.1  # of how much an earlier token changes the logits; bfloat16 keeps three digits


def embeddings_of(model: PreTrainedModel) -> Tensor:
    """[V, D] the input embeddings of a model, whose device and number of tokens are the model's."""
    return cast("nn.Embedding", model.get_input_embeddings()).weight


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose tokens see later ones.

    Args:
        model: a transformers causal LM on any device, in any mode.

    Raises:
        UserError: naming it.
    """
    embeddings = embeddings_of(model)
    if embeddings.is_meta:
        return
    ids = torch.arange(3, 10, device=embeddings.device)[None] % embeddings.shape[0]
    ahead, behind = ids.clone(), ids.clone()
    ahead[:, 4:] = ids[:, :3]  # 3 4 5 6 7 8 9 becomes 3 4 5 6 3 4 5
    behind[:, :1] = ids[:, -1:]
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if "flash" in (attention or ""):  # whose kernels are for GPUs, and the model may not be on one yet
        model.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            first, other, changed = (model(input_ids=x, use_cache=False).logits[:, 1:4] for x in (ids, ahead, behind))
    finally:
        model.train(training)
        model.config._attn_implementation = attention
    if (other - first).float().norm() > TOLERANCE * (changed - first).float().norm():
        raise UserError(
            f"`{type(model).__name__}` lets tokens see the ones after them, so it would learn to copy the answer; use a"
            " model for text generation (a decoder)."
        )
