"""Passes over the pool and the trusted rows in parts, or without files for a policy in training.

    columns, trusted = score_rows(policy, tokenizer, data.sets["pool"], data.sets["upper"])      # on one process

Only the `upper` part of the validation file is trusted here: the `monitor` part stays apart, to choose checkpoints.
Memory: a part's token ids, the logits of a chunk, and 267 float32 numbers a row (1.1 GB at a million).

Left out: refined responses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_bilevel.data.examples import Examples
from lit_bilevel.data.fingerprint import rows_digest
from lit_bilevel.data.layout import layout_for
from lit_bilevel.data.table import column
from lit_bilevel.policy.policy import Policy
from lit_bilevel.scores.columns import FEATURES
from lit_bilevel.scores.hidden import NUMBERS
from lit_bilevel.scores.measure import Measure
from lit_bilevel.scores.opening import opening_of
from lit_bilevel.scores.parts import Part, PartFiles, plan
from lit_bilevel.scores.table import columns_of
from lit_bilevel.types import Example
from lit_bilevel.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

    from lit_bilevel.data.module import BilevelDataModule

SAMPLED = 1024
"""Values of a parameter that count in the digest of a policy."""


class ScoredRows:
    """The rows of a set as a pass reads them, from the memory map.

    Args:
        table: a set of a `BilevelDataModule`.
    """

    def __init__(self, table: Dataset):
        self._examples = Examples(table, {})
        self._responses = table.select_columns(["response"])
        self.length_n = column(table, "length").to_numpy()
        self.start_n = column(table, "response_start").to_numpy()

    def __len__(self) -> int:
        return len(self.length_n)

    def __call__(self, rows: Sequence[int]) -> tuple[list[Example], list[str]]:
        """Examples and response texts at these positions."""
        return self._examples(rows), self._responses[list(rows)]["response"]

    def tokens(self, rows: np.ndarray, opening: list[int]) -> int:
        """Tokens that go through the policy for some rows."""
        whole, start = self.length_n[rows].astype(np.int64), self.start_n[rows]
        return int(whole.sum() + (whole - start + len(opening))[start > 1].sum())


class Sweep:
    """A pass in parts.

    Args:
        measure: what is asked of every row.
        sets: tables by name: `pool`, and `upper` for the trusted rows.
        folder: where finished parts lie.
        made_of: what else the numbers depend on, such as the precision.
    """

    def __init__(self, measure: Measure, sets: Mapping[str, Dataset], folder: Path, made_of: Mapping[str, Any]):
        self.measure = measure
        self.rows = {name: ScoredRows(table) for name, table in sets.items()}
        self.parts = plan({name: rows.length_n for name, rows in self.rows.items()})
        self.made_of = {
            "version": __version__,
            "sets": {name: rows_digest(table) for name, table in sets.items()},
            "policy": policy_digest(measure.policy),
            "opening": measure.opening,
            "numbers": [*FEATURES, NUMBERS],
            "batch_size": measure.batch_size,
            "call_cost": str(measure.call_cost),
            **made_of,
        }
        self.files = PartFiles(folder, self.made_of)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[Part]:
        """The parts of a process that are not finished."""
        return [part for part in self.parts[rank::world_size] if not self.files.has(part)]

    def tokens(self, parts: Sequence[Part]) -> int:
        """Tokens that go through the policy for some parts."""
        return sum(self.rows[part.set].tokens(part.rows, self.measure.opening) for part in parts)

    def score(self, part: Part, counted: Callable[[int], object] = lambda tokens: None) -> None:
        """Measure the rows of a part and keep what was found."""
        examples, responses = self.rows[part.set](part.rows.tolist())
        self.files.write(part, self.measure(examples, responses, counted))

    def columns(self, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """All numbers of the pool rows and of the trusted ones by name, when no part is missing."""
        tables = self.files.read(self.parts, {name: len(rows) for name, rows in self.rows.items()})
        return columns_of(tables["pool"], tables.get("upper"), seed)


def sweep_for(
    trainer: Trainer, policy: Policy, tokenizer: PreTrainedTokenizerBase, data: BilevelDataModule, folder: Path
) -> Sweep:
    """The pass over the pool and the trusted rows of a `BilevelDataModule`, under a Trainer's precision and device.

    Args:
        trainer: Lightning's.
        policy: on its device.
        tokenizer: of the policy.
        data: set up.
        folder: where finished parts lie.
    """
    cost = layout_for(trainer, packing=False).call_cost
    measure = Measure(policy, opening_of(tokenizer), tokenizer.eos_token_id, data.eval_batch_size, cost)
    sets = {name: data.sets[name] for name in ("pool", "upper")}
    return Sweep(measure, sets, folder, {"precision": str(trainer.precision)})


def score_rows(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    pool: Dataset,
    trusted: Dataset | None = None,
    batch_size: int = 64,
    call_cost: float = math.inf,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of pool rows under a policy as it is, without files.

    Args:
        policy: on any device; its mode and its gradients stay as they are.
        tokenizer: of the policy.
        pool: a set of a `BilevelDataModule`, such as `data.sets["pool"]`.
        trusted: the rows that both ratios compare with, such as `data.sets["upper"]`; without, they are NaN.
        batch_size: most rows in a call of the policy.
        call_cost: how many tokens' computation one more call is worth saving.
        seed: of the folds of the ratios.

    Returns:
        [N] float32 numbers of the pool rows by name, in their order: all of `COLUMNS` and of `FEATURES`; and [M] the
        same of the trusted rows.
    """
    measure = Measure(policy, opening_of(tokenizer), tokenizer.eos_token_id, batch_size, call_cost)
    tables = {}
    for name, table in (("pool", pool), ("upper", trusted)):
        if table is not None:
            rows = ScoredRows(table)
            tables[name] = np.empty((len(rows), len(FEATURES) + NUMBERS), dtype=np.float32)
            for part in plan({name: rows.length_n}):
                tables[name][part.rows] = measure(*rows(part.rows.tolist()))
    return columns_of(tables["pool"], tables.get("upper"), seed)


def policy_digest(policy: Policy) -> str:
    """Digest of a policy: names, shapes, types and some values, evenly spread, of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLED)]
        digest.update(values.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
