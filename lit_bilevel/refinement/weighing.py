"""Multiplies the tokens of generated responses by their weights, before a policy step uses them.

    log ratio_t = log π(y_t | …) − log μ(y_t | …)        μ the policy that drew the response, π the one that trains

A `ResponseWeights` makes weights of these ratios; they go into the scale of each token, so that losses, solvers and
logged means see weighted responses without knowing it. Rules that ask for the alignment of a response with the
validation loss, ⟨d, ∇ℓ⟩ along a direction d of their own, get it from one more pass.

Left out: sharing the pass of log-probabilities with the training pass where T = 1 and there is no dropout; solvers need
the weights first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_bilevel.policy.logprobs import keep_generated, response_logprobs
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.problem import Values, add_values, norm, scale_values
from lit_bilevel.refinement.response_weights import Ratios, ResponseWeights
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.types import Batch


def weigh_responses(problem: PolicyProblem, rule: ResponseWeights) -> ResponseTally:
    """Multiply the scale of generated tokens by their weights, before anything is computed on the lower batches.

    Returns:
        What was measured on this process's responses.
    """
    tally = ResponseTally.empty(rule.counted, problem.parameters[0].device)
    alignments = _alignments(problem, rule) if rule.needs_alignment else [None] * len(problem.lower)
    for index, (batch, alignment_R) in enumerate(zip(problem.lower, alignments, strict=True)):
        generated = batch.generated
        if generated is None:
            continue
        # float64, for ρ of a response is the exponential of a sum over its tokens
        log_ratio_J = (response_logprobs(problem.policy, batch) - generated.logprob_J).double()
        grouping = (generated.response_J, generated.example_R, batch.size)
        ratios = Ratios(log_ratio_J, *grouping, alignment_R, generated.agreement_R)
        weight_J, clipped_J = rule.weigh(ratios)
        scale_J = batch.scale_K[generated.token_J] * weight_J.to(batch.scale_K.dtype)
        problem.lower[index] = replace(batch, scale_K=batch.scale_K.index_copy(0, generated.token_J, scale_J))
        ratio_J, weight_R = log_ratio_J.exp(), ratios.sums(weight_J.double()) / ratios.length_R
        largest = ratio_J.argmax()
        own = ResponseTally(
            max_ratio=ratio_J[largest],
            max_row=batch.row_B[generated.example_R[generated.response_J[largest]]].double(),
            ratio_sum=ratio_J.sum(),
            tokens=ratios.length_R.sum(),
            clipped=clipped_J.sum().double(),
            weight_sum=weight_R.sum(),
            weight_square_sum=(weight_R**2).sum(),
            responses=torch.ones_like(weight_R).sum(),
            singles=rule.singles(ratios).double(),
        )
        tally = tally.merge(own)
    return tally


def _alignments(problem: PolicyProblem, rule: ResponseWeights) -> list[Tensor | None]:
    """⟨d, ∇ℓ⟩ of every response of every micro-batch, d the direction of the rule."""
    # also where no response is on this process: ∇f is averaged over all of them, and the others would wait
    direction = rule.direction(problem)
    chosen = [keep_generated(batch) for batch in problem.lower if batch.generated is not None]
    if not chosen:
        return [None] * len(problem.lower)
    parts = iter(derivatives_along(problem, chosen, direction).split([batch.size for batch in chosen]))
    return [None if batch.generated is None else next(parts) for batch in problem.lower]


def derivatives_along(problem: PolicyProblem, batches: list[Batch], direction: Values) -> Tensor:
    """⟨direction, ∇ℓ⟩ of every example of these batches."""
    other = problem.at_rows(batches)
    values = problem.values()
    if not problem.differences or values[0].dtype == torch.float64:  # as `OneStep` does, and for its reasons
        return other.lower_jvp(direction)
    epsilon = 1e-2
    length = norm(direction).clamp_min(torch.finfo(torch.float32).tiny)
    ahead_R = other.lower_losses_at(add_values(values, scale_values(direction, epsilon / length)))
    return (ahead_R - other.lower_losses_at(values)) * (length / epsilon)
