"""Watches for numerical faults, and names each with its step and rows.

    the gradient is not finite       the step is skipped and counted; `max_skipped_steps` in a row stop the run
                                     (the weights' step is taken back with it, see `Refinement.take_back`)
    all weight lies on a few rows    (Σw)²/Σw² < max(2, `min_effective_size`·N), from the weights' running sums
    importance ratios explode        some ρ_t > `max_ratio`; what a rule makes of ρ is bounded by its clip all the same

The last two warn, once a run and once a refinement round, or stop the run (`on_limit`). A run that is stopped saves
first: `BilevelCheckpoint` does, and the last good policy is what it saves, as no step was taken on bad numbers.

All of it is decided on a few numbers that are read from the device together, once a step; rows are looked for only
when something is wrong. Left out: repairing anything; a run that meets bad numbers again and again needs other settings
or other data. The weights of generated groups are not watched: they begin anew with every round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.refinement.tally import ResponseTally
from lit_bilevel.training.trainer import data_of
from lit_bilevel.types import Features
from lit_bilevel.weights.base import effective_size

if TYPE_CHECKING:
    from lit_bilevel.module import LitBilevel

NAMED = 8


@dataclass(frozen=True)
class GuardSettings:
    """Limits of a healthy run.

    Args:
        max_skipped_steps: policy steps in a row whose gradient is not finite after which the run stops.
        min_effective_size: least effective size of the weights, as a share of the pool (but at least 2 rows).
        max_ratio: largest importance ratio of a generated token.
        on_limit: what happens beyond the last two: `warn` and go on, or `stop` with a checkpoint.
    """

    max_skipped_steps: int = 10
    min_effective_size: float = 0.005
    max_ratio: float = 1e4
    on_limit: Literal["warn", "stop"] = "warn"

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        problems = []
        if self.max_skipped_steps < 1:
            problems.append(f"`model.guard.max_skipped_steps` is {self.max_skipped_steps}; it must be at least 1")
        if not 0 <= self.min_effective_size < 1:
            problems.append(f"`model.guard.min_effective_size` is {self.min_effective_size}; it must be in [0, 1)")
        if self.on_limit not in ("warn", "stop"):
            problems.append(f"`model.guard.on_limit` is {self.on_limit!r}; it must be warn or stop")
        if not self.max_ratio > 1:
            problems.append(f"`model.guard.max_ratio` is {self.max_ratio}; it must be above 1")
        return problems


class Vitals(NamedTuple):
    """What a policy step is judged by; NaN where it is not known."""

    gradient_norm: float
    effective_size: float
    max_ratio: float
    max_row: float


class Guard:
    """Watches the steps of a run, counts those that were skipped, and holds the reason why the run must end, if any.

    Args:
        settings: the limits.
    """

    def __init__(self, settings: GuardSettings):
        self.settings = settings
        self.skipped = self.in_a_row = 0
        self.reason: str | None = None
        """Why the run must end; whoever saves checkpoints does so first."""
        self._told: set[str] = set()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.skipped, self.in_a_row, self.reason, self._told = 0, 0, None, set()

    @staticmethod
    def read(norm: Tensor, effective_size: Tensor | None, tally: ResponseTally | None) -> Vitals:
        """Read from the device, all together, what a policy step is judged by."""
        unknown = norm.new_full((), math.nan)
        worst = [unknown, unknown] if tally is None else [tally.max_ratio, tally.max_row]
        # stacked, as each read by itself would wait for the device
        numbers = [norm, unknown if effective_size is None else effective_size, *worst]
        # one transfer: each number by itself would make the host wait for the device once more
        return Vitals(*torch.stack([number.double() for number in numbers]).tolist())

    def watch_ratios(self, module: LitBilevel, vitals: Vitals) -> None:
        """Look at the largest importance ratio of a policy step."""
        ratio = vitals.max_ratio
        # once a round: at the next one all ratios begin at 1 again
        if ratio > self.settings.max_ratio and self._is_new(f"round {data_of(module.trainer).responses.round}"):
            row = name_rows(module, [int(vitals.max_row)])[0]
            self._tell(
                f"{_step(module)}: importance ratios explode: a token of row {row} is"
                f" {ratio:.3g} times as likely as when it was sampled (`model.guard.max_ratio` is"
                f" {self.settings.max_ratio:g})",
                "lower the policy's learning rate, or let rounds follow sooner (`every_n_steps` of `SelfRefine`)",
            )

    def watch_weights(self, module: LitBilevel, effective_size: float) -> None:
        """Look at how many rows the weights are spread over."""
        limit = max(2.0, self.settings.min_effective_size * module.weights.pool_rows)
        if effective_size < limit and self._is_new("weights"):
            # O(N), but once a run
            heaviest = module.weights.table().topk(min(NAMED, module.weights.pool_rows))
            pairs = zip(name_rows(module, heaviest.indices.tolist()), heaviest.values.tolist(), strict=True)
            self._tell(
                f"{_step(module)}: the weights have collapsed on a few rows: their effective size is"
                f" {effective_size:.3g} of {module.weights.pool_rows} rows, the limit {limit:.3g}"
                f" (`model.guard.min_effective_size` is {self.settings.min_effective_size}); the heaviest are"
                f" {', '.join(f'{name} ({weight:.3g})' for name, weight in pairs)}",
                "lower the weight optimizer's learning rate, or set `kl_to_prior` or `cap` of the weights",
            )

    def watch_table(self, module: LitBilevel, weight_N: Tensor) -> None:
        """The same where all weights are at hand: some weightings have only an estimate in a step."""
        self.watch_weights(module, effective_size(weight_N))

    def count_taken(self) -> None:
        """Take note of a policy step that was taken."""
        self.in_a_row = 0

    def count_skipped(self, module: LitBilevel, features: Features, of_scale: bool) -> None:
        """Count a policy step that was not taken, and stop the run after many in a row.

        Args:
            module: the `LitBilevel`.
            features: rows of the global window, with their losses.
            of_scale: whether the loss scale overflowed, and not the numbers, which is no fault.
        """
        self.skipped += 1
        module.log("skipped_steps", float(self.skipped))
        if of_scale:  # a loss scale that is searched from above overflows as a matter of course
            return
        self.in_a_row += 1
        where = _step(module)
        rank_zero_warn(f"{where} was skipped, because its gradient is not finite: {_culprits(module, features)}.")
        if self.in_a_row >= self.settings.max_skipped_steps:
            self.reason = (
                f"{self.in_a_row} policy steps in a row had a gradient that is not finite (the last is {where}), so the"
                " run was stopped; look at the rows named in the warnings above, or set `model.gradient_clip_val`, and"
                " continue from the last checkpoint; or start anew with a lower learning rate, as a continued run keeps"
                f" that of its checkpoint (`model.guard.max_skipped_steps` is {self.settings.max_skipped_steps})."
            )

    def stop_if_asked(self) -> None:
        """End the run if there is a reason to.

        Raises:
            UserError: with that reason.
        """
        if self.reason is not None:
            raise UserError(self.reason)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "told": sorted(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._told = state["skipped"], set(state["told"])

    def _is_new(self, what: str) -> bool:
        new = what not in self._told
        self._told.add(what)
        return new

    def _tell(self, fact: str, remedy: str) -> None:
        if self.settings.on_limit == "warn":
            rank_zero_warn(f"{fact}. The run goes on; {remedy}.")
        else:
            self.reason = (
                f"{fact}, so the run was stopped; {remedy}, and start anew (a continued run keeps the learning rates of"
                " its checkpoint, and goes on without telling this again)."
            )


def _step(module: LitBilevel) -> str:
    return f"policy step {module.trainer.fit_loop.epoch_loop.total_batch_idx + 1}"


def _culprits(module: LitBilevel, features: Features) -> str:
    """The rows whose loss is not finite, by id."""
    if features.loss_B is None:
        return "losses are not known"
    rows = features.row_B[~torch.isfinite(features.loss_B)].tolist()
    if not rows:
        return "every row of the pool has a finite loss, so it is the validation rows or the backward pass"
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"the loss is not finite on rows {', '.join(name_rows(module, rows[:NAMED]))}{more}"


def name_rows(module: LitBilevel, rows: list[int]) -> list[str]:
    """Ids of rows as a step numbers them: pool rows, then the refined ones."""
    refined, pool_rows = module.refinement.rows.tolist(), module.weights.pool_rows
    ids = data_of(module.trainer).sets["pool"].select_columns(["id"])
    own = [(row, "") if row < pool_rows else (refined[row - pool_rows], " (a generated response)") for row in rows]
    return [f"{ids[row]['id']!r}{what}" for row, what in own]
