"""Stores generated responses, and overlays pool rows with them in the main process without editing the rows.

Loaders and their workers never see it, so no worker is stale and nothing is reloaded. A row once chosen stays chosen;
each round replaces its responses. A row none of whose responses is usable keeps its offline pair.

Left out: responses of earlier rounds; `responses.jsonl` in the run folder has them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_bilevel.data.table import has_question
from lit_bilevel.errors import UserError
from lit_bilevel.types import Example, Group, Response


def is_usable(response: Response, keep_unfinished: bool = False) -> bool:
    """Whether a response may be trained on: it has content, and it ended by itself (unless that is waived)."""
    content = len(response.token_ids) - int(response.finished)
    return content > 0 and (response.finished or keep_unfinished)


def rows_to_choose_from(pool: Dataset) -> Tensor:
    """[M] the rows of the pool that have a question; how many do not is told once.

    Raises:
        UserError: if none has.
    """
    asked_N = has_question(pool)
    without = int((~asked_N).sum())
    if without == len(pool):
        raise UserError(
            "`SelfRefine` answers questions anew, and no row of the pool has one (the format `text` has none); leave it"
            " out, or give rows with a prompt."
        )
    if without:
        rank_zero_warn(
            f"{without:,} of {len(pool):,} pool rows have no question (plain text, or cut off by `data.max_length`);"
            " `SelfRefine` never chooses them."
        )
    return torch.from_numpy(asked_N.nonzero()[0])


def rows_to_judge_by(monitor: Dataset, count: int, seed: int) -> list[int]:
    """At most so many rows of the monitor part that have a question, drawn by a seed, sorted.

    Raises:
        UserError: if none has.
    """
    asked = torch.from_numpy(has_question(monitor).nonzero()[0])
    if not len(asked):
        raise UserError(
            "`SelfRefine` judges its answers by questions of the monitor part of the validation file, and no row there"
            " has one; give validation rows with a prompt, or set `on_doubt: replace` to train on answers unjudged."
        )
    drawn = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed))[:count]
    return asked[drawn].sort().values.tolist()


class ResponseStore:
    """Responses of the refined rows in the current round."""

    def __init__(self) -> None:
        self.chosen: list[int] = []
        """All rows that were ever chosen, sorted."""
        self.round = 0
        """Rounds so far, those that were left out among them."""
        self.source = 0
        """The round that the responses are of."""
        self.offline_share = 0.0
        """κ, what a refined row's offline pair still counts."""
        self.temperature = 1.0
        self.mean_length = 1.0
        self.mean_agreement = 1.0
        self._responses: dict[int, list[Response]] = {}
        self._positions: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def rows(self) -> list[int]:
        """Rows that are refined: chosen, with at least one usable response; sorted."""
        return list(self._positions)

    def responses(self, row: int) -> list[Response]:
        """The usable responses of a refined row."""
        return self._responses[row]

    def put(
        self,
        responses: Mapping[int, Sequence[Response]],
        temperature: float,
        offline_share: float = 0.0,
        keep_unfinished: bool = False,
    ) -> None:
        """Start a round with these responses; everything of the round before is replaced.

        Args:
            responses: all responses of every chosen row.
            temperature: at which they were sampled.
            offline_share: κ in [0, 1).
            keep_unfinished: whether responses that were cut at the longest length may be trained on.
        """
        if not 0 <= offline_share < 1:
            raise UserError(f"`offline_share` is {offline_share}; it must be in [0, 1).")
        self.chosen = sorted(responses)
        usable = {row: [r for r in responses[row] if is_usable(r, keep_unfinished)] for row in self.chosen}
        every = [response for group in usable.values() for response in group]
        self.round += 1
        self.source = self.round
        self.offline_share, self.temperature = offline_share, temperature
        # a constant of the round: divided by its own length, a response would pull towards short ones
        self.mean_length = sum(len(response.token_ids) for response in every) / len(every) if every else 1.0
        self.mean_agreement = sum(response.agreement for response in every) / len(every) if every else 1.0
        self._keep({row: group for row, group in usable.items() if group})

    def leave_out(self) -> None:
        """Count a round whose responses are not trained on; everything else stays as it was."""
        self.round += 1

    def _keep(self, responses: dict[int, list[Response]]) -> None:
        self._responses = responses
        self._positions = {row: position for position, row in enumerate(sorted(responses))}

    def overlay(self, examples: Sequence[Example], pool_rows: int) -> list[Example]:
        """Examples with refined rows replaced by their groups; where κ > 0 the offline pair stays beside it."""
        if not self._responses:
            return list(examples)
        result = []
        for example in examples:
            position = self._positions.get(example.row)
            if position is None or self.offline_share > 0:
                result.append(example)
            if position is not None:
                own = tuple(self._responses[example.row])
                group = Group(own, self.mean_length, self.temperature, self.mean_agreement)
                prompt = example.input_ids[: example.response_start]
                # numbered behind the pool's rows, so that a row and its group can be told apart in one batch
                result.append(replace(example, row=pool_rows + position, input_ids=prompt, group=group))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that it loads with `weights_only=True`."""
        kept = [(row, response) for row in self.rows for response in self._responses[row]]
        return {
            "round": self.round,
            "source": self.source,
            "share": self.offline_share,  # the name in checkpoints of schema 6
            "temperature": self.temperature,
            "mean_length": self.mean_length,
            "mean_agreement": self.mean_agreement,
            "chosen": torch.tensor(self.chosen, dtype=torch.int64),
            "row": torch.tensor([row for row, _ in kept], dtype=torch.int64),
            "length": torch.tensor([len(response.token_ids) for _, response in kept], dtype=torch.int64),
            "finished": torch.tensor([response.finished for _, response in kept], dtype=torch.bool),
            "agreement": torch.tensor([response.agreement for _, response in kept], dtype=torch.float64),
            "token_ids": torch.tensor([i for _, r in kept for i in r.token_ids], dtype=torch.int64),
            "token_logprobs": torch.tensor([p for _, r in kept for p in r.token_logprobs], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.round, self.source, self.offline_share = state["round"], state["source"], state["share"]
        self.temperature, self.mean_length = state["temperature"], state["mean_length"]
        self.mean_agreement = state["mean_agreement"]
        self.chosen = state["chosen"].tolist()
        lengths = state["length"].tolist()
        ids, logprobs = (state[name].split(lengths) for name in ("token_ids", "token_logprobs"))
        responses: dict[int, list[Response]] = {}
        known = (state[name].tolist() for name in ("row", "finished", "agreement"))
        for row, finished, agreement, own, logprob in zip(*known, ids, logprobs, strict=True):
            responses.setdefault(row, []).append(Response(own.tolist(), logprob.tolist(), finished, agreement))
        self._keep(responses)
