"""What filters may look at: texts, losses and gradients of pool and validation rows, the truth for the oracle alone.

Left out: several processes. Scores are computed on the first device of the configuration.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lit_bilevel.data.collate import collate
from lit_bilevel.data.fingerprint import rows_digest
from lit_bilevel.data.layout import layout_for
from lit_bilevel.losses import example_nll
from lit_bilevel.objectives.base import Objective
from lit_bilevel.policy.load import LoraSettings, load_policy, load_tokenizer
from lit_bilevel.policy.origin import tunes_adapter
from lit_bilevel.policy.policy import Policy
from lit_bilevel.scores.columns import COLUMNS
from lit_bilevel.scores.sweep import policy_digest, score_rows
from lit_bilevel.scores.table import Scores, read_scores, seconds_taken, write_scores
from lit_bilevel.types import Batch

if TYPE_CHECKING:
    from lit_bilevel.cli import BilevelCLI
    from lit_bilevel.data.module import BilevelDataModule


class Evidence:
    """The data of a comparison as a filter sees it.

    Args:
        cli: a `BilevelCLI` that was built without running, its data set up.
        earlier: folder of the run that the filter needs.
        seed: of the run.
        shared: folder for what several filters read; without, nothing is kept.
    """

    def __init__(self, cli: BilevelCLI, earlier: Path | None, seed: int, shared: Path | None = None):
        self.data, self.trainer = cli.datamodule, cli.trainer
        self.settings = cli.model.policy_settings
        self.earlier, self.seed, self.shared = earlier, seed, shared
        self.seconds = 0.0
        """What an earlier filter spent on what this one read."""

    @property
    def ids(self) -> list[str]:
        """Ids of the pool rows."""
        return self.data.sets["pool"]["id"][:]

    @property
    def truth(self) -> str | None:
        """The truth file."""
        return self.data.truth

    def texts(self, name: str) -> list[str]:
        """Prompt and response of every row of a set, `pool` or `upper`."""
        table = self.data.sets[name]
        return [f"{p}\n{r}" for p, r in zip(table["prompt"][:], table["response"][:], strict=True)]

    def losses(self, tuned: bool = False) -> np.ndarray:
        """[N] loss of the pool rows in nats per token, under the policy before training or that of the earlier run."""
        policy = self.policy(tuned)
        with self.trainer.precision_plugin.forward_context():
            return row_losses(policy, self.data, "pool")[0]

    def scores(self) -> Scores:
        """What a pass of the policy before training says of the pool rows; made once for all that read it."""
        started = time.perf_counter()
        policy, tokenizer = self.policy(), load_tokenizer(self.settings)
        pool, trusted = self.data.sets["pool"], self.data.sets["upper"]
        made_of = [policy_digest(policy), rows_digest(pool), rows_digest(trusted), str(self.trainer.precision)]
        name = hashlib.sha256("".join(made_of).encode()).hexdigest()[:12]
        path = self.shared / f"scores-{name}.parquet" if self.shared else None
        if path is not None and path.is_file():
            self.seconds = seconds_taken(path)
            return read_scores(path)
        with self.trainer.precision_plugin.forward_context():
            cost = layout_for(self.trainer, packing=False).call_cost
            columns, _ = score_rows(policy, tokenizer, pool, trusted, self.data.eval_batch_size, cost)
        scores = Scores(self.ids, {column: columns[column] for column in COLUMNS})
        if path is not None:
            write_scores(path, scores.ids, scores.columns, {"seconds": time.perf_counter() - started})
        return scores

    def policy(self, tuned: bool = False, adapter: LoraSettings | None = None) -> Policy:
        """The policy, ready to score.

        Args:
            tuned: with the parameters that the earlier run had at its best monitor loss.
            adapter: put on a policy that is tuned whole.
        """
        settings, precision = self.settings, str(self.trainer.precision)
        assert not tuned or self.earlier is not None
        folder = str(self.earlier / "policy") if tuned and self.earlier else None
        if tunes_adapter(settings):
            policy = load_policy(settings, torch.get_default_dtype(), precision)
            if folder:
                from peft import load_peft_weights, set_peft_model_state_dict

                set_peft_model_state_dict(policy.model, load_peft_weights(folder, device="cpu"))
        else:
            if folder:  # a whole model
                settings = replace(settings, path=folder, adapter=None)
            policy = load_policy(replace(settings, lora=adapter), torch.get_default_dtype(), precision)
        return policy.to(self.trainer.strategy.root_device).eval()

    def row_gradients(self, policy: Policy, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The position and the loss gradient [P] of every row of a set, one after the other.

        Args:
            policy: whose trainable parameters count.
            name: the set, `pool` or `upper`.
        """
        device = self.trainer.strategy.root_device
        parameters = policy.trainable()
        for example in (example for window in self.data.evaluation_loader(name) for example in window.examples):
            batch = collate([example], 1).to(device)
            with self.trainer.precision_plugin.forward_context():
                loss = example_nll(policy(batch), batch).sum()
            parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            yield example.row, torch.cat([part.flatten() for part in parts]).float()


def row_losses(
    policy: Policy, data: BilevelDataModule, name: str, objective: Objective | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of every row of a set, and its number of response tokens; dropout off.

    Args:
        policy: it scores.
        data: a data module that was set up.
        name: of the set.
        objective: whose losses they are; by default nats per token of the response.

    Returns:
        [n] losses (float64) and [n] tokens, in the order of the set.
    """
    device = policy.trainable()[0].device
    loss_N, tokens_N = np.zeros(len(data.sets[name])), np.zeros(len(data.sets[name]), dtype=np.int64)
    with policy.evaluating():
        for window in data.evaluation_loader(name):
            batch: Batch = data.on_before_batch_transfer(window, 0).to(device)
            loss_B = example_nll(policy(batch), batch) if objective is None else policy.losses(objective, batch)
            rows = batch.row_B.cpu().numpy()
            loss_N[rows[rows >= 0]] = loss_B.double().cpu().numpy()[rows >= 0]
            tokens_N[rows[rows >= 0]] = batch.length_B.cpu().numpy()[rows >= 0]
    return loss_N, tokens_N
