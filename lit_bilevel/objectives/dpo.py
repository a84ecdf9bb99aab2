"""Direct preference optimisation: the chosen answer shall gain more log-probability than the rejected one.

    m_i = [log π_θ(y_c|x) − log π_ref(y_c|x)] − [log π_θ(y_r|x) − log π_ref(y_r|x)]         sums over response tokens
    ℓ_i = −log σ(β·m_i)                                                             (arXiv 2305.18290, equation 7)

π_ref is the policy with its adapter switched off, so it costs a forward pass without a graph for each batch of a step,
and no memory. β·m_i is the margin of the implicit rewards; ℓ_i = log 2 where the policy is the reference.

Left out: a reference beside a policy that is tuned whole (a second, frozen copy of it), log-probabilities of the
reference kept on disk, and variants (label smoothing, IPO, length normalisation).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.objectives.base import Objective
from lit_bilevel.types import Batch


class DPO(Objective):
    """Learns to prefer the chosen answer of each pair to the rejected one.

    Args:
        beta: β, how closely the policy is held to its reference.

    Raises:
        UserError: for a β that is not above 0.
    """

    pairs = True
    needs_reference = True

    def __init__(self, beta: float = 0.1):
        if not 0 < beta < math.inf:
            raise UserError(f"`beta` of `DPO` is {beta}; it must be above 0.")
        self.beta = beta

    def losses(self, nll_K: Tensor, batch: Batch) -> Tensor:
        real_B = (batch.row_B >= 0).to(nll_K.dtype)
        return F.softplus(-self.beta * self.margins(nll_K, batch)) * real_B

    def margins(self, nll_K: Tensor, batch: Batch) -> Tensor:
        """m_i in nats, [B], 0 for padding."""
        assert batch.reference_K is not None
        return super().margins(nll_K - batch.reference_K, batch)
