"""Weights from a small network on a row's features: w = σ(net(log(1+ℓ), log(1+length), e_source, x)) / Ẑ.

Source: Meta-Weight-Net (arXiv 1902.07379). What is learned carries over between rows, and to rows never seen; a row
about which loss, length and source say nothing cannot be told from its like. σ bounds the weights as it does there.

x are scores of the row by a pass before training (`columns`, given by the `ScoredPrior` callback): with one or two
visits a row, what is learned of one has to be known of those that look like it.

Left out: features from the policy's hidden states, which would need the policy inside the weighting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_bilevel.errors import UserError
from lit_bilevel.types import Features
from lit_bilevel.weights.running import RunningWeights


class NetworkWeights(RunningWeights):
    """One hidden layer on loss, length and a source embedding; all weights are equal at the start.

    Args:
        hidden_size: units of the hidden layer.
        source_size: numbers in a source's embedding.
        kl_to_prior: strength of the pull towards the prior, in units of the scaled score.
        decay: β of the running normaliser.
        columns: names of the scores that the network reads beside loss, length and source, such as `ifd`.
    """

    by_row = RunningWeights.by_row | {"column_NF"}

    column_NF: Tensor
    network: nn.Sequential
    source_embedding: nn.Embedding

    def __init__(
        self,
        hidden_size: int = 32,
        source_size: int = 4,
        kl_to_prior: float = 0.0,
        decay: float = 0.99,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__(kl_to_prior, decay)
        if hidden_size < 1 or source_size < 1:
            raise UserError(f"`hidden_size` is {hidden_size} and `source_size` {source_size}; both must be at least 1.")
        self.hidden_size = hidden_size
        self.source_size = source_size
        self.columns = tuple(columns)
        self.register_buffer("column_NF", torch.zeros(0, len(self.columns)))

    def create(self, source_N: Tensor, dtype: torch.dtype) -> None:
        super().create(source_N, dtype)
        device = self.loss_N.device
        self.column_NF = torch.zeros(len(source_N), len(self.columns), dtype=dtype, device=device)
        with torch.random.fork_rng(devices=[]):  # the same network on every process, and no random number used up
            torch.default_generator.manual_seed(0)  # that of the CPU alone, which is put back
            self.source_embedding = nn.Embedding(int(source_N.max()) + 1, self.source_size)
            inputs = 2 + self.source_size + len(self.columns)
            last = nn.Linear(self.hidden_size, 1)
            self.network = nn.Sequential(nn.Linear(inputs, self.hidden_size), nn.Tanh(), last)
        nn.init.zeros_(last.weight)  # equal weights at the start, whatever the features are
        nn.init.zeros_(last.bias)
        for module in (self.source_embedding, self.network):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(device, dtype)

    def log_unnormalised(self, features: Features) -> Tensor:
        assert features.loss_B is not None
        embedded_BE = self.source_embedding(features.source_B.clamp_min(0))
        # losses and lengths lie orders of magnitude apart
        numbers_B2 = torch.stack([features.loss_B, features.length_B], dim=1).to(embedded_BE.dtype).log1p()
        column_BF = self.column_NF[features.row_B.clamp_min(0)]
        inputs = torch.cat([numbers_B2, embedded_BE, column_BF], dim=1)
        return nn.functional.logsigmoid(self.network(inputs)[:, 0].double())

    def set_columns(self, table_NF: Tensor) -> None:
        if table_NF.shape != self.column_NF.shape or not table_NF.isfinite().all():
            raise UserError(
                f"the scores have the shape {tuple(table_NF.shape)}, or some are not finite; give finite ones"
                f" {tuple(self.column_NF.shape)}, a column for each of: {', '.join(self.columns) or 'none'}."
            )
        self.column_NF.copy_(table_NF)

    def assign_gradient(self, features: Features, score_B: Tensor) -> None:
        assert features.loss_B is not None
        valid_B = features.loss_B.isfinite()  # or one loss that is not would spoil the network
        features = replace(features, loss_B=torch.where(valid_B, features.loss_B, 0.0))
        score_B = score_B * valid_B
        with torch.enable_grad():
            # Ẑ counts as a constant: with centred scores the term of its derivative is 0
            weight_B = (self.log_unnormalised(features) + self.log_prior(features) - self.log_normaliser).exp()
            parameters = list(self.parameters())
            gradients = torch.autograd.grad((weight_B * score_B).mean(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
