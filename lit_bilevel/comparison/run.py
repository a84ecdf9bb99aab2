"""Runs one method with one seed: chooses rows where it filters, fits, and scores the best policy on the test set.

Every run has the same policy steps and batch sizes; a method that trains on fewer rows sees them more often. `seconds`
counts choosing rows and fitting, and the runs that a method needs first. A killed run goes on from its checkpoint.
Left out: several processes; filters score on one device.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_bilevel.callbacks.run import run_checkpoint
from lit_bilevel.cli import BilevelCLI
from lit_bilevel.comparison.answers import answer
from lit_bilevel.comparison.filters import CleanRows
from lit_bilevel.comparison.filters.evidence import Evidence, row_losses
from lit_bilevel.comparison.fitting import build, data_digests, data_flag, fit, prepare
from lit_bilevel.comparison.methods import Method, runs_behind
from lit_bilevel.comparison.names import OF_RESPONSES
from lit_bilevel.comparison.output import quiet
from lit_bilevel.comparison.recipe import read_parts
from lit_bilevel.comparison.results import Result, Results
from lit_bilevel.comparison.rows import copy_records, stratify
from lit_bilevel.comparison.stopwatch import Stopwatch
from lit_bilevel.comparison.variants import Variant
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.truth import aurocs, flat, read_truth
from lit_bilevel.training.trainer import find_callbacks, policy_of


class Runner:
    """Runs what is missing from the results.

    Args:
        config: the configuration that all methods share.
        shared: more flags for every run.
        results: what is finished.
        keep: share of the pool that filters keep.
        subset: rows of the pool that are used at all, or `None` for all of them.
        max_steps: policy steps of every run, or `None` for those of the configuration.
        answers: whether to answer the test prompts.
        keep_checkpoints: whether finished runs keep their checkpoints.
        variants: further methods by their names.
        say: shows progress.
    """

    def __init__(
        self,
        config: str,
        shared: list[str],
        results: Results,
        keep: float = 0.6,
        subset: int | None = None,
        max_steps: int | None = None,
        answers: bool = False,
        keep_checkpoints: bool = False,
        variants: Mapping[str, Variant] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        if not 0 < keep < 1:
            raise UserError(f"`--keep` is {keep:g}; it must lie between 0 and 1.")
        self.config, self.results, self.keep, self.answers = config, results, keep, answers
        self.keep_checkpoints, self.variants, self.say = keep_checkpoints, variants or {}, say
        looks = max(1, (max_steps or 1) // 8)
        steps = [f"--trainer.val_check_interval={looks}", "--trainer.check_val_every_n_epoch=null"]
        self.shared = ["--checkpoint.every_minutes=5", *(steps if max_steps else []), *shared]
        if max_steps:
            self.shared += [f"--trainer.max_steps={max_steps}", "--trainer.max_epochs=-1"]
        with quiet(results.folder / "settings.txt"):
            cli = build(config, self.shared)
            if subset is not None:
                self.shared.append(data_flag("pool", self._subset(cli, subset)))
                cli = build(config, self.shared)
        self.settings: Namespace = cli.config
        if cli.trainer.world_size > 1:
            raise UserError(
                f"a comparison runs in one process and the settings ask for {cli.trainer.world_size}; set"
                " `--trainer.devices 1` (and start one comparison a device, each with an `--output` of its own)."
            )
        self.sets, self.truth = cli.datamodule.sets, cli.datamodule.truth
        self.kinds = self._kinds(self.sets["pool"])
        if "test" not in self.sets:
            raise UserError("there is nothing to compare on; give `--data.test`, a file of held-out rows.")
        results.require({"data": data_digests(cli)})
        self.steps = self._run_steps(cli.trainer)

    # ---- a row of the table ----

    def row(self, name: str, seed: int) -> Result:
        """The result of a method, from the files or by running it and what it needs."""
        result = self.results.find(name, seed)
        if result is None:
            result = self.make_row(name, seed)
            self.results.add(result)
        return result

    def make_row(self, name: str, seed: int) -> Result:
        """Run a method; what it needs is added to the results, the row itself is not."""
        method = Method.parse(name, self.variants)
        return self._best(name, method, seed) if method.best_of else self._run(name, method, seed)

    def _best(self, name: str, method: Method, seed: int) -> Result:
        rows = [self.row(other, seed) for other in method.best_of]
        blind = [row["method"] for row in rows if "monitor_loss" not in row]
        if blind:
            raise UserError(
                f"{name!r} chooses by the monitor loss, which was never looked at in {', '.join(blind)}; lower"
                " `trainer.val_check_interval`, or give `--max_steps`."
            )
        best = min(rows, key=lambda row: row["monitor_loss"])
        seconds = sum(self._own_seconds(run, seed) for run in sorted(runs_behind(name, self.variants)))
        chosen = best.get("chosen", best["method"])
        return {**best, "method": name, "chosen": chosen, "seconds": seconds}

    def _own_seconds(self, name: str, seed: int) -> float:
        """Time of a run without the one that it needs."""
        needs = Method.parse(name, self.variants).needs
        return self.row(name, seed)["seconds"] - (self.row(needs, seed)["seconds"] if needs else 0.0)

    def _run(self, name: str, method: Method, seed: int) -> Result:
        before = self.row(method.needs, seed)["seconds"] if method.needs else 0.0
        earlier = self.results.run_folder(method.needs, seed) if method.needs else None
        self.say(f"{name}, seed {seed} …")
        folder = self.results.run_folder(name, seed)
        parts = self._parts(method.variant, folder.parent / "rows" / f"seed{seed}") if method.variant else []
        phases, callbacks = read_parts(self.settings)
        flags = method.phases(phases, self.steps)
        flags += [*method.flags, *parts, f"--seed_everything={seed}"]
        flags += () if method.refine else OF_RESPONSES
        given = folder / "given" if method.weights else earlier
        flags.append(method.callbacks(callbacks, given))
        prepare(folder, [*self.shared, *flags])
        row: Result = {"method": name, "seed": seed}
        if method.weights is not None:
            with quiet(folder / "weights.txt"):
                scores, seconds = self._weigh(method, parts, folder / "given", seed)
            before, row = before + seconds, row | scores
        if method.filter is not None:
            with quiet(folder / "filter.txt"):
                chosen, scores, seconds = self._choose(method, parts, folder, earlier, seed)
            flags += [data_flag("pool", chosen), "--data.truth=null", "--data.cache=false"]
            flags += self._as_many_steps(method.variant)
            before += seconds
            row |= scores
        with quiet(folder / "log.txt"):
            cli = fit(folder, self.config, [*self.shared, *flags])
            row |= self._score(cli, folder)
        row["seconds"] += before
        if not self.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.say(f"{name}, seed {seed}: test loss {row['test_loss']:.4f}, {row['seconds']:.0f} s")
        del cli
        gc.collect()
        return row

    # ---- parts of a run ----

    @property
    def _epoch_steps(self) -> int:
        """Policy steps of an epoch on the whole pool."""
        window = self.settings.data.batch_size * self.settings.model.accumulate_grad_batches
        return math.ceil(len(self.sets["pool"]) / window)

    def _run_steps(self, trainer: Trainer) -> int:
        """Policy steps of a run on the whole pool.

        Raises:
            UserError: where they cannot be told.
        """
        if trainer.limit_train_batches != 1.0:
            raise UserError(
                f"`trainer.limit_train_batches` is {trainer.limit_train_batches}, and methods on fewer rows would see"
                " another part of them; give `--max_steps` or `--subset`."
            )
        ends = [trainer.max_steps, -1 if trainer.max_epochs is None else self._epoch_steps * trainer.max_epochs]
        ends = [steps for steps in ends if steps >= 0]
        if not ends:
            raise UserError("no run would end by its steps; set `trainer.max_epochs` or `--max_steps`.")
        return min(ends)

    def _as_many_steps(self, variant: Variant | None) -> list[str]:
        """Flags for a run on fewer rows: as many steps as the others take, where its variant sets none, under their λ.

        Such a run has more epochs, and a λ that falls after each of its own would not be that of the methods beside it.
        """
        own = {name.removeprefix("trainer.") for name in (variant and variant.flags) or {}}
        flags = [] if "max_epochs" in own else ["--trainer.max_epochs=-1"]
        if own & {"max_steps", "max_epochs"}:
            return flags
        return [f"--trainer.max_steps={self.steps}", *flags, f"--model.upper_weight_decay_every={self._epoch_steps}"]

    def _subset(self, cli: BilevelCLI, count: int) -> str | list[str]:
        """Files with a part of the pool, stratified by source and, where there is a truth, by kind of corruption."""
        data = cli.config.data
        pool = cli.datamodule.sets["pool"]
        ids = pool["id"][:]
        truth = cli.datamodule.truth
        kinds = read_truth(truth, ids) if truth else [""] * len(ids)
        rows = stratify(list(zip(pool["source"][:], kinds, strict=True)), count, seed=0).tolist()
        positions = pool["row"][:]
        chosen = {positions[row]: ids[row] for row in rows}
        return copy_records(data.pool, data.columns or {}, chosen, self.results.folder / "subset")

    def _kinds(self, pool: Dataset) -> list[str] | None:
        """Kind of corruption of every row of a pool, where there is a truth."""
        return read_truth(self.truth, pool["id"][:]) if self.truth else None

    def _parts(self, variant: Variant, folder: Path) -> list[str]:
        """Flags for files with the rows that a variant sees, where these are not all."""
        data, flags = self.settings.data, []
        if variant.pool_rows:
            pool = self.sets["pool"]
            rows = variant.pool(pool["source"][:], self.kinds)
            chosen = dict(zip(pool.select(rows)["row"][:], pool.select(rows)["id"][:], strict=True))
            flags.append(data_flag("pool", copy_records(data.pool, data.columns or {}, chosen, folder / "pool")))
            flags += self._as_many_steps(variant)
        if variant.validation_rows:
            both = [self.sets[name] for name in ("upper", "monitor")]
            position, key, source = ([v for part in both for v in part[name][:]] for name in ("row", "id", "source"))
            rows = variant.validation(source)
            chosen = {position[row]: key[row] for row in rows}
            files = copy_records(data.validation, data.columns or {}, chosen, folder / "validation")
            flags.append(data_flag("validation", files))
        return flags

    def _choose(
        self, method: Method, parts: list[str], folder: Path, earlier: Path | None, seed: int
    ) -> tuple[str | list[str], Result, float]:
        """Files with the rows that a filter keeps, AUROC of its scores, and the time it took."""
        assert method.filter is not None
        started = time.perf_counter()
        cli = build(self.config, [*self.shared, *method.flags, *parts, f"--seed_everything={seed}"])
        evidence = Evidence(cli, earlier, seed, self.results.folder)
        scores = method.filter.scores(evidence)
        mask = method.filter.choose(scores, self.keep, seed)
        pool, data = cli.datamodule.sets["pool"], cli.config.data
        kept = {row: key for row, key, good in zip(pool["row"][:], pool["id"][:], mask, strict=True) if good}
        files = copy_records(data.pool, data.columns or {}, kept, folder / "pool")
        result: Result = {"kept": float(mask.mean())}
        kinds = self._kinds(pool)
        if kinds is not None and not isinstance(method.filter, CleanRows):
            import torch

            result["kept_clean"] = float(np.array([not kind for kind in kinds])[mask].mean())
            result |= flat(aurocs(torch.tensor(scores), kinds)) if method.filter.scored else {}
        return files, result, time.perf_counter() - started + evidence.seconds

    def _weigh(self, method: Method, parts: list[str], folder: Path, seed: int) -> tuple[Result, float]:
        """Write the weights that the rows keep; returns their AUROC, and the time it took."""
        import torch

        assert method.weights is not None
        started = time.perf_counter()
        cli = build(self.config, [*self.shared, *method.flags, *parts, f"--seed_everything={seed}"])
        evidence = Evidence(cli, None, seed, self.results.folder)
        weights = method.weights.write_weights(evidence, folder)
        kinds = self._kinds(cli.datamodule.sets["pool"])
        result = flat(aurocs(torch.tensor(weights), kinds)) if kinds is not None else {}
        return result, time.perf_counter() - started + evidence.seconds

    def _score(self, cli: BilevelCLI, folder: Path) -> Result:
        """What is measured of a finished fit, whose module holds the monitor-best policy."""
        import pyarrow
        import pyarrow.parquet

        metrics = json.loads((folder / "metrics.json").read_text())
        row: Result = {key.replace("test/", "test_"): v for key, v in metrics.items() if key.startswith("test/")}
        row["perplexity"] = math.exp(row["test_loss_per_token"])
        own = run_checkpoint(cli.trainer)
        if own is not None and own.best_model_score is not None:
            row["monitor_loss"] = float(own.best_model_score)
        (stopwatch,) = find_callbacks(cli.trainer, Stopwatch)
        row["steps"], row["seconds"] = cli.trainer.global_step, stopwatch.seconds
        if cli.model.learns_weights or cli.model.weights.needs_scoring:
            row |= {key: value for key, value in metrics.items() if key.startswith("auroc/")}
        policy = policy_of(cli.model).to(cli.trainer.strategy.root_device)  # Lightning moved it away at the end
        with cli.trainer.precision_plugin.forward_context():
            objective = cli.model.evaluation.upper
            losses = {
                "test": row_losses(policy, cli.datamodule, "test"),
                "monitor": row_losses(policy, cli.datamodule, "monitor", objective),
            }
        for name, (loss_n, tokens_n) in losses.items():
            table = {"id": cli.datamodule.sets[name]["id"][:], "tokens": tokens_n, "loss": loss_n}
            pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}_losses.parquet")
        return row | (answer(cli, folder) if self.answers else {})
