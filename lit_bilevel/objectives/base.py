"""The socket for objectives: the NLL of predicted tokens in, one loss per example out.

    ℓ_i(θ) = objective( NLL_k(θ) of the tokens k of example i )                 f and g are means of these over rows

Weights, solvers and the policy step see ℓ_i alone, so an objective serves at both levels and under every solver.
Left out: objectives that need more of the policy than log-probabilities of the data's own tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_bilevel.types import Batch


class Objective(ABC):
    """Turns the token losses of a batch into the loss of each example."""

    pairs: bool = False
    """Whether examples must be preference pairs: `batch.sign_K` is then set."""
    needs_reference: bool = False
    """Whether the token losses of the reference, the policy with its adapter switched off, must be in the batch."""

    @abstractmethod
    def losses(self, nll_K: Tensor, batch: Batch) -> Tensor:
        """ℓ_i, [B], twice differentiable in the token losses and in forward mode too; 0 for padding.

        Args:
            nll_K: [K] NLL of the predicted tokens, in nats.
            batch: which example each token belongs to.
        """

    def margins(self, nll_K: Tensor, batch: Batch) -> Tensor:
        """By how many nats a pair is ranked as the data says, [B], 0 for padding: log π(y_c|x) − log π(y_r|x)."""
        assert batch.sign_K is not None
        return nll_K.new_zeros(batch.size).index_add(0, batch.segment_K, -nll_K * batch.sign_K.to(nll_K.dtype))
