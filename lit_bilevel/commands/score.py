"""`lit-bilevel score`: scores every pool row by one pass of a policy, before anything is trained, as a parquet file.

    lit-bilevel score --config configs/quality.yaml --data.pool P --data.validation V --model.policy.path M \\
        --output scores.parquet

Settings are those of `fit`; what only matters to training is without effect. Finished parts lie in `OUTPUT.parts` until
the file is written: a second call goes on there. Several processes (`--trainer.strategy ddp --trainer.devices 2`, or
torchrun) take a share each and write the same file. Left out: policies that are sharded over processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lit_bilevel.cli import BilevelCLI, tell_errors
from lit_bilevel.data.table import column, longest
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.truth import aurocs, read_truth
from lit_bilevel.policy.load import PolicySettings, context_length, load_policy, load_tokenizer
from lit_bilevel.resources import locate_configs
from lit_bilevel.scores.columns import COLUMNS
from lit_bilevel.scores.sweep import sweep_for
from lit_bilevel.scores.table import Scores, why_missing, write_scores
from lit_bilevel.training.trainer import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from lit_bilevel.data.module import BilevelDataModule
    from lit_bilevel.policy.policy import Policy

NOTHING = -1
"""Stands for no part: Lightning refuses a process that has nothing to do while others have."""
AGAIN = "Call the same command again: finished parts are kept."


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    options, shared = parser().parse_known_args(arguments[1:])
    return tell_errors(lambda: _score(options, shared), "lit-bilevel score", AGAIN)


def parser() -> argparse.ArgumentParser:
    """Of the command's own options."""
    own = argparse.ArgumentParser(
        prog="lit-bilevel score",
        description="Score every pool row by one pass of a policy: losses with and without the prompt, their difference"
        " and ratio, entropy, length, and how much the row is like the validation rows. Flags that are not listed are"
        " those of `lit-bilevel fit` (`--data.pool P`, `--model.policy.path M`, …).",
        allow_abbrev=False,
    )
    own.add_argument("--config", action="append", required=True, help="configuration of the data and the policy")
    own.add_argument("--output", required=True, help="the new file, .parquet")
    own.add_argument("--features", action="store_true", help="also write what else was measured of every row")
    return own


class Settings(BilevelCLI):
    """Trainer, module and data of a fit, which is not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class Scoring(LightningModule):
    """The pass as Lightning runs it: every process measures the rows of its parts.

    Args:
        settings: which policy.
        data: a `BilevelDataModule` that is not set up yet.
        output: the file to be written.
    """

    def __init__(self, settings: PolicySettings, data: BilevelDataModule, output: Path):
        super().__init__()
        self.settings, self.data, self.output = settings, data, output
        self.tokenizer = load_tokenizer(settings)
        self.policy: Policy | None = None

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup("predict")
        context, most = context_length(self.settings), longest(self.data.sets.values())
        if context is not None and most > context:
            raise UserError(
                f"the longest row has {most} tokens and the policy was made for {context}; set `data.max_length` to at"
                f" most {context}."
            )

    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = load_policy(self.settings, torch.get_default_dtype(), str(self.trainer.precision))

    def predict_dataloader(self) -> list[int]:
        """Numbers of the parts that this process has to do; the policy is there by now."""
        trainer, data = self.trainer, self.data
        assert self.policy is not None
        folder = self.output.with_name(self.output.name + ".parts")
        self.sweep = sweep_for(trainer, self.policy, self.tokenizer, data, folder)
        if trainer.is_global_zero and (known := self.sweep.files.open()):
            rank_zero_info(f"{known} of {len(self.sweep.parts)} parts are known from {folder}")
        trainer.strategy.barrier("parts")
        missing = self.sweep.missing(trainer.global_rank, trainer.world_size)
        self.bar = tqdm(
            total=self.sweep.tokens(missing),
            desc="score",
            unit=" tokens",
            unit_scale=True,
            disable=not trainer.is_global_zero or not missing,
            mininterval=0.2 if sys.stderr.isatty() else 20,  # plain lines in a log
        )
        return [part.number for part in missing] or [NOTHING]

    def predict_step(self, number: int, batch_idx: int) -> int:
        if number != NOTHING:
            self.sweep.score(self.sweep.parts[number], self.bar.update)
        return number


def _score(options: argparse.Namespace, shared: list[str]) -> None:
    output = Path(options.output)
    if output.suffix != ".parquet":
        raise UserError(f"`--output` is {options.output!r}; its name must end in .parquet.")
    started = time.perf_counter()
    configs = locate_configs([part for name in options.config for part in ("--config", name)])
    cli = Settings(["fit", *configs, *shared])
    trainer = cli.trainer
    _check(trainer.strategy)
    callbacks_of(trainer).clear()  # those of a fit
    trainer.loggers = []
    scoring = Scoring(_as_it_is(cli.model.policy_settings), cli.datamodule, output)
    trainer.predict(scoring, return_predictions=False)
    trainer.strategy.barrier("scored")
    if not trainer.is_global_zero:
        return
    scoring.bar.close()
    sweep, data = scoring.sweep, scoring.data
    columns, trusted = sweep.columns()
    shown = columns if options.features else {name: columns[name] for name in COLUMNS}
    made_of = {**sweep.made_of, "policy_path": scoring.settings.path}
    write_scores(output, column(data.sets["pool"], "id"), shown, made_of, trusted)
    sweep.files.remove()
    _tell(columns, data, output, time.perf_counter() - started)


def _check(strategy: Strategy) -> None:
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise UserError(
            f"`trainer.strategy` is {type(strategy).__name__}, which spreads the policy over processes that would have"
            " to work in step; use `ddp`, where each has the whole policy."
        )


def _as_it_is(settings: PolicySettings) -> PolicySettings:
    """The policy without an adapter that is still to be trained, unless quantization needs one."""
    if settings.lora is None or settings.quantization is not None:
        return settings
    rank_zero_info("`model.policy.lora` is without effect: a new adapter changes nothing until it is trained")
    return replace(settings, lora=None)


def _tell(columns: dict[str, np.ndarray], data: BilevelDataModule, output: Path, seconds: float) -> None:
    rows = len(data.sets["pool"])
    for name, values in columns.items():
        if name in COLUMNS and (missing := int(np.isnan(values).sum())):
            sys.stdout.write(f"{missing:,} of {rows:,} rows have no `{name}`: {why_missing(name)}\n")
    if data.truth is not None:
        kinds = read_truth(data.truth, data.sets["pool"]["id"][:])
        sys.stdout.write(truth_table(Scores([], {name: columns[name] for name in COLUMNS}), kinds))
    sys.stdout.write(f"{rows:,} rows in {seconds:.1f} s, written to {output}\n")
    sys.stdout.write("keep the better ones with: lit-bilevel select --weights … --by combined --keep 0.6 --pool …\n")


def truth_table(scores: Scores, kinds: list[str]) -> str:
    """AUROC of clean rows against corrupted ones by every column, in the direction that `select` keeps."""
    by_column = {}
    for name in scores.columns:
        try:
            by_column[name] = aurocs(torch.from_numpy(scores.orient(name)), kinds)
        except UserError:  # a column that not all rows have
            continue
    names = list(next(iter(by_column.values()), {}))
    if not names:
        return "the truth file calls all rows clean, or all corrupted, so there is no AUROC\n"
    width = max(len(name) for name in by_column)
    lines = [" " * width + "".join(f"  {name:>12.12}" for name in names)]
    lines += [
        f"{column:<{width}}" + "".join(f"  {own[name]:>12.3f}" for name in names) for column, own in by_column.items()
    ]
    return "AUROC of clean rows against corrupted ones\n" + "\n".join(lines) + "\n"
