"""Online self-refining generation: keeps the question of a badly weighted row and lets the policy answer it anew.

    choose rows → sample G responses each with the current policy → score them once → store them       (every round)

From then on these rows contribute their responses (lit_bilevel/README.md 6; arXiv 2511.21056). A row once chosen stays
chosen, and every round regenerates all of them; its offline weight takes no step, its group weighs 1 anew. Responses
that are empty or did not end by themselves are kept on file and out of training, and so are those that `trust` finds no
better than the old answers (`on_doubt`); a row left with none keeps its offline pair. The first round comes after
`start` epochs (or steps), none at the very end of training.
A round that fails, or is not trusted at all, leaves everything as it was: the run goes on bit for bit as without it.

Left out: policies whose parameters are sharded; every process scores its own responses, which sharding does not allow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.callbacks.answering import answer_anew
from lit_bilevel.callbacks.judging import compare_answers, keep_trusted
from lit_bilevel.callbacks.progress import say
from lit_bilevel.callbacks.round_report import Round
from lit_bilevel.callbacks.round_weights import write_round_weights
from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_folder
from lit_bilevel.data.responses import ResponseStore, rows_to_choose_from, rows_to_judge_by
from lit_bilevel.errors import UserError, gather
from lit_bilevel.generation.base import GenerationBackend, Sampling
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.generation.respond import GenerationFailed
from lit_bilevel.module import LitBilevel
from lit_bilevel.refinement.choose import LowestFraction, RowChooser
from lit_bilevel.refinement.responses_file import ResponseFile, records
from lit_bilevel.refinement.trust import Agreed, Trust
from lit_bilevel.training.phases import learns_after
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.types import Response


class SelfRefine(Callback):
    """Replaces the responses of chosen rows by the policy's own, every so often.

    Args:
        choose: which rows, of those that have a question; by default the lowest-weighted tenth.
        responses: G, responses of a row.
        every_n_epochs: epochs between rounds; 1 unless `every_n_steps` is set.
        every_n_steps: policy steps between rounds.
        start: epochs (or steps) before the first round.
        sampling: how responses are drawn.
        offline_share: κ, what the offline pair of a refined row still counts.
        keep_unfinished: train also on responses that were cut at the longest length.
        backend: what generates; by default `HFGenerate`.
        rows_shown: rows of the table in TensorBoard.
        trust: tells from the answers to the monitor's questions which new answers are better than the old ones; by
            default `Agreed`.
        on_doubt: answers that are not trusted: `keep` the old ones, or `replace` them all the same, unjudged.
        on_failure: where generation fails, `keep` the responses there are and go on, or `stop` with a checkpoint.
    """

    generates_responses = True
    """Read by `training/callbacks.py`, which does not know this class."""

    def __init__(
        self,
        choose: RowChooser | None = None,
        responses: int = 1,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        start: int = 1,
        sampling: Sampling | None = None,
        offline_share: float = 0.0,
        keep_unfinished: bool = False,
        backend: GenerationBackend | None = None,
        rows_shown: int = 20,
        on_failure: Literal["keep", "stop"] = "stop",
        trust: Trust | None = None,
        on_doubt: Literal["keep", "replace"] = "keep",
    ):
        self.choose = choose or LowestFraction()
        self.responses = responses
        self.by_steps = every_n_steps is not None
        self.every = every_n_steps if every_n_steps is not None else (every_n_epochs or 1)
        self.start = start
        self.sampling = sampling or Sampling()
        self.offline_share = offline_share
        self.keep_unfinished = keep_unfinished
        self.backend = backend or HFGenerate()
        self.rows_shown = rows_shown
        self.on_failure = on_failure
        self.trust = trust or Agreed()
        self.on_doubt = on_doubt
        self._file: ResponseFile | None = None
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._monitor: list[int] = []
        self._spent = self._began = 0.0
        self._length, self._refined_at, self._pending = 0, -1, False
        self._check_settings(every_n_epochs, every_n_steps)

    def _check_settings(self, every_n_epochs: int | None, every_n_steps: int | None) -> None:
        problems = []
        if every_n_epochs is not None and every_n_steps is not None:
            problems.append("`every_n_epochs` and `every_n_steps` are both set; set one of them")
        for name, value, least in (
            ("responses", self.responses, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_steps", every_n_steps, 1),
            ("start", self.start, 0),
        ):
            if value is not None and value < least:
                problems.append(f"`{name}` is {value}; it must be at least {least}")
        if self.on_failure not in ("keep", "stop"):
            problems.append(f"`on_failure` is {self.on_failure!r}; it must be keep or stop")
        if self.on_doubt not in ("keep", "replace"):
            problems.append(f"`on_doubt` is {self.on_doubt!r}; it must be keep or replace")
        if not 0 <= self.offline_share < 1:
            problems.append(f"`offline_share` is {self.offline_share}; it must be in [0, 1)")
        if self.sampling.temperature == 0 and self.responses > 1:
            problems.append(f"`sampling.temperature` is 0, so all {self.responses} `responses` would be the same")
        if problems:
            raise gather("bad settings of `SelfRefine`", problems)

    # ---- when ----

    def should_refine(self, done: int) -> bool:
        """Whether a round is due after so many epochs (or steps)."""
        return done >= self.start and done > 0 and (done - self.start) % self.every == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        last = step == trainer.max_steps or (trainer.is_last_batch and _is_last_epoch(trainer))
        if self.by_steps and step != self._refined_at and self.should_refine(step) and not last:
            self._refined_at = step  # a skipped step must not refine again
            self.refine(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.by_steps and self.should_refine(trainer.current_epoch + 1) and not _is_last_epoch(trainer):
            module = module_of(pl_module)
            module.weights.recount()  # as the module does after this
            self.refine(trainer, module)

    # ---- a round ----

    def refine(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, judge, store, record and show one round."""
        module = module_of(pl_module)
        data = data_of(trainer)
        store: ResponseStore = data.responses
        weight_N = module.weights.table().cpu()
        chosen = self._rows[self.choose.rows(weight_N[self._rows], data.seed)]
        # a row once chosen stays: its offline answer was given up, and its responses are of an older policy by now
        rows = sorted({*store.chosen, *chosen.tolist()})
        if not rows:
            say(f"no row is answered anew: `{type(self.choose).__name__}` chose none")
            return
        self._end_round(trainer, module)  # before its responses are replaced
        wanted: dict[str, Sequence[int]] = {"pool": rows, "monitor": self._monitor}
        started, number = time.monotonic(), store.round + 1
        try:
            generated = answer_anew(trainer, module, self.backend, self.sampling, wanted, self.responses, number)
        except GenerationFailed as error:
            self._fail(module, number, error)
            return
        seconds = time.monotonic() - started
        self._spent += seconds
        sides = compare_answers(data.sets, module.tokenizer, generated, self.trust, self.keep_unfinished)
        answers, verdict = sides[0], self.trust.judge(*sides[1:]) if self.on_doubt == "keep" else None
        used: dict[int, list[Response]]
        if verdict is not None and verdict.least is None:
            store.leave_out()
            used = {row: [] for row in rows}
        else:
            used = keep_trusted(answers, verdict, self.keep_unfinished)
            store.put(used, self._temperature, self.offline_share, self.keep_unfinished)
            kept = torch.tensor(store.rows, dtype=torch.int64)
            module.refinement.begin_round(kept, module.weights, data.pool_sources, self.offline_share)
        if trainer.is_global_zero:
            if self._file is not None:
                pool = data.sets["pool"]
                self._file.append(records(pool, module.tokenizer, answers, used, number, self._temperature))
            tokens = sum(len(r.token_ids) for side in generated.values() for group in side.values() for r in group)
            share_of_time = self._spent / max(time.monotonic() - self._began, 1e-9)
            used = {row: group for row, group in used.items() if group}
            done = Round(number, answers, used, verdict, tokens, seconds, share_of_time, self.keep_unfinished)
            done.report(trainer, module, self.rows_shown)

    @property
    def _temperature(self) -> float:
        """At which log-probabilities are taken; greedy answers have those of the policy."""
        return self.sampling.temperature or 1.0

    def _end_round(self, trainer: Trainer, module: LitBilevel) -> None:
        """Note what the responses that are trained on have come to weigh."""
        if self._file is not None and module.refinement.active:
            write_round_weights(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_round(trainer, module_of(pl_module))

    def _fail(self, module: LitBilevel, round: int, error: GenerationFailed) -> None:
        """Go on with the responses there are, or ask for a stop; a stopped run begins with this round again."""
        if self.on_failure == "keep":
            rank_zero_warn(f"refinement round {round} failed ({error}); the run goes on with the responses it has.")
            return
        self._pending = True
        module.guard.reason = (
            f"refinement round {round} failed ({error}), so the run was stopped; mend its cause and continue from the"
            " last checkpoint, or set `on_failure: keep` of `SelfRefine` to go on with the responses there are."
        )

    # ---- the run ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # what an earlier one left
            self._length, self._refined_at, self._pending, self._file = 0, -1, False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and type(trainer.strategy) is not DDPStrategy:
            raise UserError(
                f"`SelfRefine` scores different responses on every process, which `{type(trainer.strategy).__name__}`"
                " does not allow; use `trainer.strategy: ddp`."
            )
        module = module_of(pl_module)
        if module.lower_objective.pairs:
            raise UserError(
                "`SelfRefine` replaces answers, and `model.lower_objective` learns from pairs; leave one of them out."
            )
        if module.policy_settings.quantization == "8bit":
            rank_zero_warn(
                "`model.policy.quantization` is 8bit, whose kernels round activations, so importance ratios of an"
                " unchanged policy are not exactly 1 (`refine/ratio_max` shows how far off they are); `4bit` is exact."
            )
        data = data_of(trainer)
        self._rows = rows_to_choose_from(data.sets["pool"])
        judged = self.on_doubt == "keep"
        self._monitor = rows_to_judge_by(data.sets["monitor"], self.trust.questions, data.seed) if judged else []
        if judged and (known := len(self._monitor)) < self.trust.fewest:
            say(
                f"`SelfRefine` judges new answers by questions of the monitor part, at least {self.trust.fewest}, and"
                f" there are {known}, so every round will be left out. Give more validation rows, a larger"
                " `data.monitor_fraction`, a smaller `fewest` of `trust`, or `on_doubt: replace`."
            )
        if module.refinement.rule.needs_agreement and self.responses < 2:
            raise UserError(
                f"`model.response_weights` compares the answers to a question, and `responses` of `SelfRefine` is"
                f" {self.responses}; set it to 2 or more."
            )
        if trainer.is_global_zero and not is_rehearsal(trainer):
            self._file = ResponseFile(run_folder(trainer) / "responses.jsonl")
            self._file.cut(self._length)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = module_of(pl_module)
        policy = policy_of(module)
        self._began, self._spent = time.monotonic(), 0.0
        with trainer.precision_plugin.forward_context():
            self.backend.check(policy)  # now, and not after the first epochs
        if self._pending:
            self._pending = False
            self.refine(trainer, module)
        steps = trainer.estimated_stepping_batches
        last = steps if self.by_steps else trainer.max_epochs
        first = self.start * (1 if self.by_steps else trainer.num_training_batches)
        learns = module.solver.learns and learns_after(module.phases, first, steps)
        if module.refinement.template.learnable and not learns:
            say(
                "no phase learns weights when answers come, so every group of them weighs 1; `model.refined_weights:"
                " BMOWeights` would weigh groups by their losses"
            )
        if last not in (None, -1) and self.start >= last:
            unit = "steps" if self.by_steps else "epochs"
            rank_zero_warn(
                f"nothing will be refined: the first round comes after {self.start} {unit} and the run has"
                f" {last:.0f}; lower `start` of `SelfRefine` below that."
            )

    def state_dict(self) -> dict[str, Any]:
        length = self._length if self._file is None else self._file.length
        return {"length": length, "refined_at": self._refined_at, "pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._length, self._refined_at, self._pending = (state_dict[k] for k in ("length", "refined_at", "pending"))


def _is_last_epoch(trainer: Trainer) -> bool:
    steps_done = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return steps_done or trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
