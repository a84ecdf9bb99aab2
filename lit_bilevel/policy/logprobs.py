"""Computes log-probabilities of the generated responses in a batch.

    log π(y_t | …) = −NLL_t at temperature T        one teacher-forced pass over the sampled ids, dropout off

The same function gives behaviour log-probabilities when a round begins and the policy's own during training, in float32
whatever `trainer.precision` is, so an unchanged policy has ratios of 1 to 1e-5. (In bfloat16 they were 0.93 to 1.09.)
Tokens are drawn in the precision of training, so what is called the law that drew them is that law without rounding.
Only the generated sequences of a batch go through the pass, padded also where the batch is packed.

Left out: what is made of them; see `refinement/weighing.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_bilevel.policy.arithmetic import in_float32
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Batch, Part


def response_logprobs(policy: Policy, batch: Batch) -> Tensor:
    """[J] log-probability of each generated token at the temperature it was sampled at, dropout off, in float32."""
    assert batch.generated is not None
    # in bfloat16 two passes over batches of other shapes differ by 7 to 10 % a token, which a ratio would show as a
    # change of the policy; with dropout on, one pass differs from itself
    with policy.evaluating(), in_float32(policy):
        return -policy(keep_generated(batch), batch.generated.temperature)


def keep_generated(batch: Batch) -> Batch:
    """The generated sequences alone, each an example of its own, tokens in the order of J."""
    generated = batch.generated
    assert generated is not None
    width = batch.input_ids_ST.shape[1]
    # positions are flat over S·T, so a sequence that moves up takes its own along
    shift_R = (torch.arange(len(generated.sequence_R), device=batch.row_B.device) - generated.sequence_R) * width
    example_R = generated.example_R
    return Batch(
        row_B=batch.row_B[example_R],
        source_B=batch.source_B[example_R],
        length_B=batch.length_B[example_R],
        input_ids_ST=batch.input_ids_ST[generated.sequence_R],
        position_K=batch.position_K[generated.token_J] + shift_R[generated.response_J],
        target_K=batch.target_K[generated.token_J],
        segment_K=generated.response_J,  # every response by itself, not summed into its row's group
        scale_K=batch.scale_K[generated.token_J],
        parts=(Part(0, len(generated.sequence_R), width, len(generated.token_J)),),
        window_rows=batch.window_rows,
    )
