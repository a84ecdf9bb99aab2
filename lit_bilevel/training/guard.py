"""Numerical faults in training, each named with its step and rows and handled by a rule.

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
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_bilevel.errors import UserError
from lit_bilevel.problem import norm as total_norm
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.types import Features

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.amp import GradScaler
    from torch.optim.lr_scheduler import LambdaLR

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


class Guard:
    """Counts skipped steps, and holds the reason why a run must end, if there is one.

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

    def steps(
        self,
        module: LitBilevel,
        optimizer: LightningOptimizer,
        features: Features,
        size: Tensor | None,
        found: Tensor | None,
    ) -> bool:
        """Clip the policy's gradient and take its step and that of its schedule, unless the gradient is not finite.

        Args:
            module: the `LitBilevel`.
            optimizer: the policy's, as Lightning wraps it.
            features: rows of the global window, with their losses.
            size: effective size of the weights, where they know it.
            found: what was measured on the generated responses of all processes, if there were any.

        Returns:
            Whether the step was taken, on every process alike.
        """
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        norm = _clipped(module, scaler)
        unknown = norm.new_full((), math.nan)
        worst = [unknown, unknown] if found is None else [found[0], found[1]]
        numbers = [value.double() for value in (norm, unknown if size is None else size, *worst)]
        length, rows, ratio, row = torch.stack(numbers).tolist()
        if found is not None:
            self._look_at_ratios(module, ratio, row)
        if not math.isfinite(length):
            self._skip(module, features, _lowered(scaler))
            return False
        optimizer.step()
        engine = _deepspeed_engine(module)
        if engine is not None and not engine.was_step_applied():  # it looks at gradients by itself
            self._skip(module, features, getattr(engine.optimizer, "loss_scale", 1) > 1)
            return False
        cast("LambdaLR", module.lr_schedulers()).step()
        self._look_at_weights(module, rows)
        self.in_a_row = 0
        return True

    def look(self, module: LitBilevel, weight_N: Tensor) -> None:
        """Look at all weights, where they are at hand: some weightings have only an estimate in a step."""
        self._look_at_weights(module, float(weight_N.sum() ** 2 / (weight_N**2).sum()))

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

    # ---- the rules ----

    def _skip(self, module: LitBilevel, features: Features, of_scale: bool) -> None:
        """Count a step that was not taken; an overflow of the loss scale, not of the numbers, is no fault."""
        self.skipped += 1
        module.log("skipped_steps", float(self.skipped))
        if of_scale:
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

    def _look_at_weights(self, module: LitBilevel, rows: float) -> None:
        limit = max(2.0, self.settings.min_effective_size * module.weights.pool_rows)
        if rows < limit and self._is_new("weights"):
            heaviest = module.weights.table().topk(min(NAMED, module.weights.pool_rows))
            pairs = zip(named(module, heaviest.indices.tolist()), heaviest.values.tolist(), strict=True)
            self._tell(
                f"{_step(module)}: the weights have collapsed on a few rows: their effective size is {rows:.3g} of"
                f" {module.weights.pool_rows} rows, the limit {limit:.3g} (`model.guard.min_effective_size` is"
                f" {self.settings.min_effective_size}); the heaviest are"
                f" {', '.join(f'{name} ({weight:.3g})' for name, weight in pairs)}",
                "lower the weight optimizer's learning rate, or set `kl_to_prior` or `cap` of the weights",
            )

    def _look_at_ratios(self, module: LitBilevel, ratio: float, row: float) -> None:
        if ratio > self.settings.max_ratio and self._is_new(f"round {data_of(module.trainer).responses.round}"):
            self._tell(
                f"{_step(module)}: importance ratios explode: a token of row {named(module, [int(row)])[0]} is"
                f" {ratio:.3g} times as likely as when it was sampled (`model.guard.max_ratio` is"
                f" {self.settings.max_ratio:g})",
                "lower the policy's learning rate, or let rounds follow sooner (`every_n_steps` of `SelfRefine`)",
            )

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


def _clipped(module: LitBilevel, scaler: GradScaler | None) -> Tensor:
    """Norm of the policy's gradient, before it is clipped."""
    if _deepspeed_engine(module) is not None:
        # it keeps the gradients to itself, clips them and skips steps that overflowed
        return torch.zeros((), device=module.device)
    scale = 1.0 if scaler is None else scaler.get_scale()  # Lightning unscales in the step, and may do so once only
    parameters = policy_of(module).trainable()
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if module.gradient_clip_val is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, module.gradient_clip_val * scale, norm)
    return norm / scale


def _lowered(scaler: GradScaler | None) -> bool:
    """Lower the loss scale after an overflow; whether it was above 1, so that the overflow was its own."""
    if scaler is None or scaler.get_scale() <= 1:
        return False
    lower = scaler.get_scale() * scaler.get_backoff_factor()
    scaler.load_state_dict({**scaler.state_dict(), "scale": lower, "_growth_tracker": 0})
    return True


def _deepspeed_engine(module: LitBilevel) -> Any:
    """DeepSpeed's engine, where that is the strategy."""
    strategy = module.trainer.strategy
    return strategy.model if isinstance(strategy, DeepSpeedStrategy) else None


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
    return f"the loss is not finite on rows {', '.join(named(module, rows[:NAMED]))}{more}"


def named(module: LitBilevel, rows: list[int]) -> list[str]:
    """Ids of rows as a step numbers them: pool rows, then the refined ones."""
    refined, pool_rows = module.refinement.rows.tolist(), module.weights.pool_rows
    ids = data_of(module.trainer).sets["pool"].select_columns(["id"])
    own = [(row, "") if row < pool_rows else (refined[row - pool_rows], " (a generated response)") for row in rows]
    return [f"{ids[row]['id']!r}{what}" for row, what in own]
