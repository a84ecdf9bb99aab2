"""Begins the weights at the scores of one pass of the policy over the pool, before the first step.

Before the first step of a run the policy, which nothing was trained on yet, is asked once about every row (as
`lit-bilevel score` does), the columns are added to one score, and the weights begin at σ of it. `scores.parquet` of the
run folder keeps the columns. Weights that read scores themselves (`columns` of `NetworkWeights`) are given theirs.

    trainer = Trainer(callbacks=[ScoredPrior()], max_steps=500)      # or `trainer.callbacks+=ScoredPrior`
    trainer.fit(LitBilevel(PolicySettings("model"), SigmoidWeights(), OneStep()), data)

A run that is killed during the pass goes on with its parts; several processes take a share each, and the folder must be
one that all of them see. A continued run has its prior in the checkpoint. Left out: a pass of a policy that is sharded
over processes; `lit-bilevel score` on one of them makes the file that `scores` names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_folder
from lit_bilevel.data.fingerprint import rows_digest
from lit_bilevel.data.table import column
from lit_bilevel.errors import UserError, gather
from lit_bilevel.module import LitBilevel
from lit_bilevel.scores.columns import COLUMNS, COMBINED, DIRECTION
from lit_bilevel.scores.combination import SHARPNESS, combine, normal_scores, prior_weights
from lit_bilevel.scores.sweep import Sweep, score_rows, sweep_for
from lit_bilevel.scores.table import Scores, read_scores, write_scores
from lit_bilevel.training.callbacks import closers
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.weights.base import effective_size

FILE = "scores.parquet"
Numbers = dict[str, np.ndarray]


class ScoredPrior(Callback):
    """Scores the pool before the first step and sets the prior of the weights from it.

    Args:
        columns: scores that are added up; a row that one of them does not know is decided by the others.
        sharpness: how far apart the weights are; 0 is equal ones, with 2 rows one standard deviation above the mean
            score weigh seven times as much as those one below.
        scores: a file that `lit-bilevel score` wrote, of the same rows, instead of a pass.
    """

    scores_rows = True
    """Read by `training/callbacks.py`, which does not know this class."""

    def __init__(
        self,
        columns: Sequence[str] = COMBINED,
        sharpness: float = SHARPNESS,
        scores: str | None = None,
    ):
        problems = []
        if not columns or not set(columns) <= set(COLUMNS):
            problems.append(f"`columns` are {', '.join(columns) or 'none'}; there are: {', '.join(COLUMNS)}")
        if not 0 <= sharpness < float("inf"):
            problems.append(f"`sharpness` is {sharpness}; it must be at least 0")
        if problems:
            raise gather("bad settings of `ScoredPrior`", problems)
        self.columns, self.sharpness, self.scores = tuple(columns), sharpness, scores
        self._both: tuple[Numbers, Numbers] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What `both_scores` says: a continued run need not have the file."""
        if self._both is None:
            return {}
        pool, trusted = ({name: torch.from_numpy(values) for name, values in part.items()} for part in self._both)
        return {"pool": pool, "trusted": trusted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            parts = (state_dict["pool"], state_dict["trusted"])
            pool, trusted = ({name: values.numpy() for name, values in part.items()} for part in parts)
            self._both = pool, trusted

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._both = None  # what an earlier one left
        strategy = trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy)
        if stage == "fit" and sharded and self.scores is None:
            raise UserError(
                f"`ScoredPrior` asks the policy about other rows on every process, which {type(strategy).__name__} does"
                " not allow; make the scores by `lit-bilevel score` and give the file as its `scores`, or use"
                " `trainer.strategy: ddp`."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = module_of(pl_module)
        if trainer.ckpt_path is not None or module.weights.visits.any():  # they have their prior already
            return
        started = time.monotonic()
        scores, trusted = self._get_scores(trainer, module)
        if trusted and closers(trainer):  # nobody else asks, and checkpoints keep them
            priors = combine(scores, self.columns), combine(scores, self.columns, trusted)
            numbers = [{"prior": z, "policy": -c["loss"]} for z, c in zip(priors, (scores, trusted), strict=True)]
            self._both = numbers[0], numbers[1]
        for name in self.columns:
            if not np.isfinite(scores[name]).any():
                rank_zero_warn(f"no row has a `{name}`, so the prior is without it; `lit-bilevel score` says why.")
        weight_N = torch.from_numpy(prior_weights(combine(scores, self.columns), self.sharpness))
        module.weights.set_prior(weight_N)
        if names := module.weights.columns:
            module.weights.set_columns(standardise(scores, names))
        rank_zero_info(
            f"scored {len(weight_N):,} pool rows in {time.monotonic() - started:.0f} s: {self.scores or FILE}\n"
            f"the weights begin at {' + '.join(self.columns)}, effective size"
            f" {effective_size(weight_N) / len(weight_N):.0%} of the pool"
        )

    # ---- the scores ----

    def both_scores(self) -> tuple[Numbers, Numbers]:
        """The sum of the columns and the loss under the untouched policy, high for rows to be kept.

        Returns:
            [N] numbers of the pool rows by name, and [M] the same of the trusted rows.

        Raises:
            UserError: if the file of scores is not of these trusted rows.
        """
        if self._both is None:
            raise UserError(
                f"there are no scores of the trusted rows of this run in {self.scores or FILE}; score this pool and"
                " validation file anew, with the same `data.monitor_fraction` and `seed_everything`, or start the run"
                " anew without a file of `scores`."
            )
        return self._both

    def _get_scores(self, trainer: Trainer, module: LitBilevel) -> tuple[Numbers, Numbers]:
        """All columns of the pool rows and of the trusted rows, on every process; none where the file has others."""
        data = data_of(trainer)
        policy = policy_of(module)
        if self.scores is not None:
            return self._read(trainer)
        with trainer.precision_plugin.forward_context():
            if is_rehearsal(trainer):  # leaves no files
                return score_rows(policy, module.tokenizer, data.sets["pool"], data.sets["upper"])
            path = run_folder(trainer) / FILE
            sweep = sweep_for(trainer, policy, module.tokenizer, data, path.with_name(f"{FILE}.parts"))
            made_of = {**sweep.made_of, "policy_path": module.policy_settings.path}
            if not trainer.strategy.broadcast(_is_known(path, made_of)):
                self._pass(trainer, sweep)
                if trainer.is_global_zero:
                    columns, trusted = sweep.columns()
                    write_scores(path, column(data.sets["pool"], "id"), columns, made_of, trusted)
                    sweep.files.remove()
        trainer.strategy.barrier("scores")
        return self._read(trainer)

    def _read(self, trainer: Trainer) -> tuple[Numbers, Numbers]:
        """The columns in the file, in the order of the pool, and of the trusted rows, if it has these."""
        path, sets = self.scores or str(run_folder(trainer) / FILE), data_of(trainer).sets
        found = read_scores(path)
        # they have no ids in the file, and other rows would be taken for these
        same = ((found.made_of or {}).get("sets") or {}).get("upper") == rows_digest(sets["upper"])
        return _join(found, column(sets["pool"], "id").to_pylist(), path), (found.trusted or {}) if same else {}

    @staticmethod
    def _pass(trainer: Trainer, sweep: Sweep) -> None:
        """This process's parts that are not finished; all parts are there at the end."""
        if trainer.is_global_zero and (known := sweep.files.open()):
            rank_zero_info(f"{known} of {len(sweep.parts)} parts are known from {sweep.files.folder}")
        trainer.strategy.barrier("parts")
        missing = sweep.missing(trainer.global_rank, trainer.world_size)
        bar = trainer.progress_bar_callback
        with tqdm(
            total=sweep.tokens(missing),
            desc="score",
            unit=" tokens",
            unit_scale=True,
            disable=not trainer.is_global_zero or bar is None or getattr(bar, "is_disabled", False),
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
        ) as shown:
            for part in missing:
                sweep.score(part, shown.update)
        trainer.strategy.barrier("scored")


def standardise(columns: dict[str, np.ndarray], names: Sequence[str]) -> torch.Tensor:
    """[N, F] the columns as weights read them: standardised by their ranks, high for rows to be kept.

    Raises:
        UserError: for a name that is not there.
    """
    if unknown := [name for name in names if name not in columns]:
        raise UserError(f"`columns` of the weights names {unknown[0]!r}; there are: {', '.join(columns)}.")
    scores = [DIRECTION.get(name, 1) * normal_scores(columns[name]) for name in names]
    return torch.from_numpy(np.stack(scores, axis=1))


def _is_known(path: Path, made_of: dict[str, Any]) -> bool:
    """Whether the file holds the scores of these rows under this policy: the run was killed after its pass."""
    try:
        return read_scores(path).made_of == made_of
    except UserError:
        return False


def _join(scores: Scores, ids: list[str], path: str) -> Numbers:
    """The columns in the order of the pool."""
    position = {key: number for number, key in enumerate(scores.ids)}
    if missing := sum(key not in position for key in ids):
        raise UserError(f"{path} has no scores for {missing:,} of {len(ids):,} pool rows; score this pool.")
    order = np.array([position[key] for key in ids])
    return {name: values[order] for name, values in scores.columns.items()}
