"""The LightningDataModule: files in, policy steps with both levels out.

The validation file is split once, by a hash of the ids: `upper` trains the weights (and the policy when λ > 0),
`monitor` is never trained on: it chooses the checkpoint, and judges refinement rounds. Results are reported on `test`.

Left out: sampler injection by the Trainer. Each process takes its share of a global window by itself, which makes the
result independent of the number of processes.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule

from lit_bilevel.data.announce import announce, write_skipped
from lit_bilevel.data.collate import collate
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.examples import Batches, EvaluationWindows, Examples, Window, question_batches, questions_of
from lit_bilevel.data.fingerprint import fingerprint, refuse_changes
from lit_bilevel.data.folds import folds_of, split_folds
from lit_bilevel.data.layout import layout_for
from lit_bilevel.data.prepare import Preparation, cache_folder, load_tokenizer
from lit_bilevel.data.refusals import check_settings
from lit_bilevel.data.responses import ResponseStore
from lit_bilevel.data.sets import read_sets
from lit_bilevel.data.stream import PairedStream, Schedule, StepMaker
from lit_bilevel.data.table import column, is_paired, source_numbers
from lit_bilevel.errors import UserError
from lit_bilevel.resources import locate
from lit_bilevel.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BilevelDataModule(LightningDataModule):
    """Pool, validation and test data of a bilevel run.

    Args:
        pool: the unclean training data: a json, jsonl, csv or parquet file, a folder that `datasets` saved or one of
            data files, or a hub id (`name:config:split`); or a list of these, whose rows then have the file's name as
            source if they have none.
        validation: the small trusted set, in the same formats.
        test: rows for the final report; they never touch training.
        truth: file that says which pool rows are corrupted (`id`, `corrupted` or `harmful`, `kind`); for scoring only.
        tokenizer: folder or hub id; by default that of the policy.
        batch_size: pool rows of a micro-batch, per process.
        upper_batch_size: validation rows of a micro-batch, per process; by default as many as pool rows.
        eval_batch_size: rows of a batch in monitor and test loops, and prompts that are answered at once, per process.
        max_length: longest sequence in tokens, prompt and response together.
        truncation: the side on which longer ones are cut: `right` the response, `left` first the oldest prompt tokens.
        train_on: assistant turns that are learned where there are several.
        monitor_fraction: share of the validation file that is not trained on and chooses the checkpoint.
        format: `auto` (by the columns), `prompt_response`, `messages`, `sharegpt`, `alpaca`, `preference` or `text`.
        columns: renames of columns, theirs to ours.
        on_bad_row: `error` names bad records and stops; `skip` leaves them out, counts them and lists them in
            `skipped.jsonl`.
        cache: where tokenized sets are kept for later runs: `true` is `$XDG_CACHE_HOME/lit_bilevel` (by default
            `~/.cache/lit_bilevel`), another folder, or `false` for a temporary one.
        num_proc: processes that tokenize.
        num_workers: worker processes that read batches.
        pin_memory: whether to pin batches.
        packing: put several rows one after the other in place of padding; none of them sees another.
        seed: seed of the data order; by default that of `seed_everything`, else 0.
    """

    def __init__(
        self,
        pool: list[str] | str,
        validation: list[str] | str,
        test: list[str] | str | None = None,
        truth: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        upper_batch_size: int | None = None,
        eval_batch_size: int = 64,
        max_length: int = 512,
        truncation: Literal["right", "left"] = "right",
        train_on: Literal["last", "all"] = "last",
        monitor_fraction: float = 0.2,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        cache: bool | str = True,
        num_proc: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        packing: bool = False,
        seed: int | None = None,
    ):
        super().__init__()
        self.paths = {"pool": pool, "validation": validation, "test": test}
        self.truth = None if truth is None else locate(truth)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.upper_batch_size = batch_size if upper_batch_size is None else upper_batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.encoding: dict[str, Any] = {"truncation": truncation, "train_on": train_on}
        self.monitor_fraction = monitor_fraction
        self.source_settings: dict[str, Any] = {"format": format, "columns": columns or {}}
        self.on_bad_row, self.cache, self.num_proc = on_bad_row, cache, num_proc
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.packing = packing
        self.seed = self._own_seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.source_names: list[str] = []
        self.sets: dict[str, Dataset] = {}
        self.skipped: dict[str, list[str]] = {}
        self.responses = ResponseStore()
        self.pair_levels: Collection[str] = ()
        """The levels, `lower` or `upper`, whose objective learns from pairs; with a Trainer, its module says."""
        self._read_for: tuple[PreTrainedTokenizerBase | None, list[str]] = (None, [])
        self._stream: PairedStream | None = None
        self._position = 0
        check_settings(self)

    # ---- reading ----

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and tokenize all sets, once for a tokenizer; a fit begins with the first step.

        Raises:
            UserError: for files, records, overlaps or sizes that cannot be used.
        """
        if stage == "fit":
            self._forget()
        if self.truth is not None and not Path(self.truth).is_file():
            raise UserError(f"{self.truth} does not exist; check `data.truth`, or leave it out.")
        if self.trainer is not None:
            self.pair_levels = getattr(self.trainer.lightning_module, "pair_levels", ())
        tokenizer, levels = self._load_tokenizer(), sorted(self.pair_levels)
        if not self.sets or self._read_for[0] is not tokenizer or self._read_for[1] != levels:
            self._read(tokenizer)
            self._read_for = (tokenizer, levels)
        if self.trainer is not None and stage == "fit" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_skipped(Path(self.trainer.default_root_dir), self.skipped)

    def _forget(self) -> None:
        """Put away what an earlier fit left: its position, its generated responses, a checkpoint's seed."""
        self._stream, self._position, self.responses = None, 0, ResponseStore()
        self.seed = self._own_seed
        self.__dict__.pop("fingerprint", None)  # also of the number of rows in a step

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._preparation = Preparation(  # kept, for a temporary folder lasts as long as it does
            Encoder(tokenizer, self.max_length, **self.encoding),
            cache_folder(self.cache),
            self.on_bad_row,
            self.num_proc,
            progress=sys.stderr.isatty() and self._process[0] == 0,
        )
        self.sets, self.skipped, formats = read_sets(
            self.paths, self._preparation, self.source_settings, self.pair_levels, self.monitor_fraction
        )
        self.source_names = sorted(column(self.sets["pool"], "source").unique().to_pylist())
        self.__dict__.pop("fingerprint", None)
        announce(self.sets, self.skipped, formats, tokenizer)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return self._given_tokenizer
        if self.trainer is None:
            raise UserError("`data.tokenizer` is not set and there is no policy to take it from; give a folder or id.")
        return cast("PreTrainedTokenizerBase", self.trainer.lightning_module.tokenizer)

    @functools.cached_property
    def _given_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(locate(self.tokenizer or ""))

    def _examples(self, name: str) -> Examples:
        sources = {source: number for number, source in enumerate(self.source_names)}
        return Examples(self.sets[name], sources, pairs=is_paired(self.sets[name]))

    @property
    def _process(self) -> tuple[int, int]:
        """Number of this process, and of all."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # ---- what others ask for ----

    @property
    def pool_sources(self) -> torch.Tensor:
        """[N] source number of every pool row in the weight table."""
        return torch.from_numpy(source_numbers(self.sets["pool"], self.source_names))

    def window(self, level: Literal["lower", "upper"]) -> int:
        """Rows of a policy step over all processes."""
        module = self.trainer.lightning_module if self.trainer else None
        accumulated = getattr(module, "accumulate_grad_batches", 1)
        size = self.batch_size if level == "lower" else self.upper_batch_size
        return size * accumulated * self._process[1]

    # ---- loaders ----

    def train_dataloader(self) -> PairedStream:
        schedule = Schedule(
            len(self.sets["pool"]), len(self.sets["upper"]), self.window("lower"), self.window("upper"), self.seed
        )
        if schedule.pool_rows < schedule.window:
            raise UserError(
                f"the pool has {schedule.pool_rows} rows and a policy step takes {schedule.window};"
                " lower `data.batch_size`, `model.accumulate_grad_batches` or the number of processes"
                f" ({self._process[1]})."
            )
        trainer = self.trainer
        assert trainer is not None
        make = StepMaker(
            schedule,
            {level: self._examples(name) for level, name in (("lower", "pool"), ("upper", "upper"))},
            *self._process,
            repeat_first_epoch=trainer.overfit_batches > 0,  # type: ignore[attr-defined]
        )
        self._stream = PairedStream(make, schedule.steps, lambda: int(trainer.num_training_batches), self.num_workers)
        self._stream.position = self._position
        return self._stream

    def val_dataloader(self) -> Batches:
        return self.evaluation_loader("monitor")

    def test_dataloader(self) -> Batches:
        if "test" not in self.sets:
            raise UserError("`data.test` is not set, so there is nothing to test on; give a file of held-out rows.")
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> Batches:
        """The test prompts, dealt out to the processes: lists of `Question`, the last of which may be empty."""
        if "test" not in self.sets:
            raise UserError("`data.test` is not set, so there are no prompts to answer; give a file of held-out rows.")
        questions = questions_of(self.sets["test"])
        return question_batches(questions, self.eval_batch_size, *self._process)

    def evaluation_loader(self, name: str) -> Batches:
        """Every row of a set once, dealt out to the processes."""
        length_N = column(self.sets[name], "length").to_numpy()
        windows = EvaluationWindows(self._examples(name), length_N, self.eval_batch_size, *self._process)
        return Batches(windows, len(windows))

    # ---- what the main process adds ----

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Collate windows, in training with the current responses of refined rows.

        Here and not in the loader, for Lightning converts tensors to the run's precision just before.
        """
        if isinstance(batch, Window):
            return self._pin([collate(batch.examples, batch.rows, *layout_for(self.trainer, self.packing))])[0]
        if not isinstance(batch, dict):
            return batch
        return {level: self._micro_batches(level, window) for level, window in batch.items()}

    def _micro_batches(self, level: str, window: Window) -> list[Batch]:
        """Batches of at most `batch_size` rows, those of like length together; as many on every process."""
        size, batches = self.batch_size if level == "lower" else self.upper_batch_size, []
        for start in range(0, len(window.examples), size):
            examples = window.examples[start : start + size]
            # folds first: a question is in one of them, whoever answers it
            for part in split_folds(examples, folds_of(self.trainer, level)):
                rows = self.responses.overlay(part, len(self.sets["pool"])) if level == "lower" else part
                batches.append(collate(rows, window.rows, *layout_for(self.trainer, self.packing)))
        return self._pin(batches)

    def _pin(self, batches: list[Batch]) -> list[Batch]:
        return [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        position = self._stream.position if self._stream else self._position
        return {
            "position": position,
            "seed": self.seed,
            "responses": self.responses.state_dict(),
            "fingerprint": self.fingerprint,
        }

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the data are; a checkpoint of others is refused."""
        windows = {"pool": self.window("lower"), "validation": self.window("upper")}
        order = {f"{name} rows of a policy step": rows for name, rows in windows.items()}
        return fingerprint(self.sets, order, self._preparation.encoder.identity)

    def refuse_changes(self, state_dict: dict[str, Any]) -> None:
        """Refuse the state of a run on other data."""
        refuse_changes(state_dict["fingerprint"], self.fingerprint, self.paths)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = state_dict["position"]
        self.seed = state_dict["seed"]
        self.responses.load_state_dict(state_dict["responses"])
        if self._stream is not None:
            self._stream.position = self._position
