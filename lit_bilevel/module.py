"""The LightningModule: holds the policy and the data weights, and steps them in turn.

    s_B  = solver(problem)                                      one score per pool row of the step
    ω    ← outer optimizer( mean_i s_i · dw_i/dω )              weight step, from the rows of all processes
    θ    ← inner optimizer( λ·∇f + (1−λ)·∇ mean_i w_i·ℓ_i )     policy step, with the new weights

Weights first: in the other order a row is trained on before its own first score, and in the first epoch the weights of
a table could not act at all (measured on real text: the run equalled direct mixing until its second epoch).

Manual optimization with two optimizers. The outer one is stepped raw, so `global_step` counts policy steps and
`max_steps`, checkpoint cadence and logging mean what they always mean. Every process applies the same weight step.

Left out: automatic optimization, which knows one optimizer; the Trainer's clipping and accumulation are arguments here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lit_bilevel.errors import settings_missing
from lit_bilevel.generation.hf import answers
from lit_bilevel.objectives.base import Objective
from lit_bilevel.objectives.sft import SFT
from lit_bilevel.policy.compile import compile_layers
from lit_bilevel.policy.load import PolicySettings, load_policy, load_tokenizer
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.policy.shard import shard
from lit_bilevel.refinement.groups import Refinement
from lit_bilevel.refinement.response_weights import ResponseWeights, UniformRatio
from lit_bilevel.refinement.tally import measures
from lit_bilevel.refinement.weighing import weigh_responses
from lit_bilevel.solvers.base import BilevelSolver
from lit_bilevel.training.begin import begin, begin_fit
from lit_bilevel.training.checkpoint import restore_late, restore_own, save_own
from lit_bilevel.training.engine import make_problem
from lit_bilevel.training.evaluation import Evaluation
from lit_bilevel.training.exchange import gather_scores, gather_tally
from lit_bilevel.training.guard import Guard, GuardSettings
from lit_bilevel.training.optimizers import make_optimizers
from lit_bilevel.training.phases import WHOLE, Phase, current_index, enter_phase
from lit_bilevel.training.policy_step import step_policy
from lit_bilevel.training.preparation import prepare_solver, rests
from lit_bilevel.training.refusals import check_flags, check_run, check_settings
from lit_bilevel.training.schedule import upper_weight_of
from lit_bilevel.types import Batch, Features, Question
from lit_bilevel.weights.base import ExampleWeights
from lit_bilevel.weights.optimizer import ExponentiatedGradient

OptimizerCallable = Callable[[Iterable], Optimizer]


class LitBilevel(LightningModule):
    """Holds the policy and the learnable data weights, and alternates their steps.

    Args:
        policy: which model is tuned, and how.
        weights: how data weights are parameterised.
        solver: how a policy step is turned into scores for the weights.
        upper_objective: f, what is learned of the validation rows: `SFT` (the default), or `DPO` from preference pairs.
        lower_objective: ℓ, the same of the pool rows.
        optimizer: makes the policy's optimizer.
        weight_optimizer: makes the weights' optimizer.
        upper_weight: λ; the policy minimises λ·f + (1−λ)·g.
        upper_weight_decay: taken off λ after every epoch, down to 0.
        upper_weight_decay_every: policy steps after which it is taken off instead, whatever an epoch is.
        phases: parts of the run with settings of their own, in their order; by default it has one.
        lr_scheduler: schedule of the policy's learning rate, by its name in `transformers.get_scheduler`.
        lr_scheduler_kwargs: settings of that schedule, such as `min_lr_rate`.
        warmup_steps: policy steps over which the learning rate rises from 0.
        gradient_clip_val: largest norm of the policy's gradient.
        accumulate_grad_batches: micro-batches in a policy step.
        response_weights: how generated responses count inside their row's group (with the `SelfRefine` callback).
        refined_weights: weights of these groups; by default the same class as `weights`, learned anew.
        max_new_tokens: longest answer that `predict` generates.
        guard: limits beyond which a run is warned about or stopped.
    """

    def __init__(
        self,
        policy: PolicySettings,
        weights: ExampleWeights,
        solver: BilevelSolver,
        *,
        upper_objective: Objective | None = None,
        lower_objective: Objective | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        weight_optimizer: OptimizerCallable = ExponentiatedGradient,
        upper_weight: float = 0.5,
        upper_weight_decay: float = 0.0,
        upper_weight_decay_every: int | None = None,
        phases: list[Phase] | None = None,
        lr_scheduler: str = "constant",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        warmup_steps: int = 0,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        response_weights: ResponseWeights | None = None,
        refined_weights: ExampleWeights | None = None,
        max_new_tokens: int = 256,
        guard: GuardSettings | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen parameters are not in checkpoints; `on_load_checkpoint` checks the rest
        self.policy_settings = policy
        self.policy: Policy | None = None
        self.weights, self.solver = weights, solver
        self.upper_objective, self.lower_objective = upper_objective or SFT(), lower_objective or SFT()
        self.optimizer, self.weight_optimizer = optimizer, weight_optimizer
        self.upper_weight, self.upper_weight_decay = upper_weight, upper_weight_decay
        self.upper_weight_decay_every = upper_weight_decay_every
        self.phases = tuple(phases or [WHOLE])
        self.lr_scheduler, self.lr_scheduler_kwargs, self.warmup_steps = lr_scheduler, lr_scheduler_kwargs, warmup_steps
        self.gradient_clip_val, self.accumulate_grad_batches = gradient_clip_val, accumulate_grad_batches
        self.response_weights = response_weights
        self._refined_weights = (refined_weights,)  # in a tuple, so that they are no submodule
        self.refinement = Refinement(refined_weights or weights, response_weights or UniformRatio(), weight_optimizer)
        self.max_new_tokens = max_new_tokens
        self.guard = Guard(guard or GuardSettings())
        self.evaluation = Evaluation(self.lower_objective, self.upper_objective)
        self.own_optimizer: Optimizer | None = None  # the outer one, where the strategy takes one only
        self.uncast: list[tuple[Tensor, Tensor]] = []  # the weights' parameters as they were before DeepSpeed took them
        self.pool_digest: str | None = None  # of the pool that the weights are for
        self._own_state: dict[str, Any] = {}
        check_settings(self)

    @property
    def refined_weights(self) -> ExampleWeights | None:
        """What was given as such; the refinement works on copies."""
        return self._refined_weights[0]

    # ---- building ----

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The one that makes the rows: `data.tokenizer` where that is set, else the policy's."""
        data = getattr(self._trainer, "datamodule", None)
        return load_tokenizer(self.policy_settings, getattr(data, "tokenizer", None))

    def setup(self, stage: str) -> None:
        check_run(self, stage)
        begin(self, stage)

    def configure_callbacks(self) -> list[Any]:
        check_flags(self.trainer)  # Lightning asks for callbacks before it raises errors of its own
        return []

    def configure_model(self) -> None:
        """Load the policy; called once, where the strategy wants it to be made."""
        if self.policy is None:
            precision = str(self.trainer.precision)
            self.policy = load_policy(self.policy_settings, torch.get_default_dtype(), precision)
            if self.lower_objective.needs_reference or self.upper_objective.needs_reference:
                self.policy.check_reference()
            if self.policy_settings.compile:
                compile_layers(self.policy, self.trainer.strategy.root_device.type == "cpu")
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard(self.policy, self.trainer.strategy.root_device)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The data weights take the same step on every process, so DDP, which asks for this name, leaves them alone."""
        named = (*self.named_parameters(), *self.named_buffers())
        return [name for name, _ in named if name.startswith(("weights.", "refinement."))]

    def configure_optimizers(self) -> Any:
        return make_optimizers(self)

    # ---- training ----

    @property
    def phase(self) -> Phase:
        """The phase that this step is in."""
        return self.phases[current_index(self)]

    @property
    def current_upper_weight(self) -> float:
        """λ in this step."""
        return upper_weight_of(self)

    @property
    def pair_levels(self) -> list[str]:
        """The levels whose rows must be preference pairs; the data module asks for them."""
        levels = {"lower": self.lower_objective, "upper": self.upper_objective}
        return [level for level, objective in levels.items() if objective.pairs]

    @property
    def learns_weights(self) -> bool:
        """Whether solver and weights together change any weight."""
        return self.solver.learns and self.weights.learnable

    def training_step(self, batch: dict[str, list[Batch]], batch_idx: int) -> None:
        inner, outer = self._optimizers()
        inner.optimizer.zero_grad(set_to_none=True)
        problem = make_problem(self, batch, inner.optimizer)
        if rests(self):
            self._log_step(prepare_solver(self, inner, problem))
            return
        tally = weigh_responses(problem, self.refinement.rule) if self.refinement.active else None
        s_B = self._ask_solver(problem)
        uneven = self.refinement.active or (self.phase.runs_solver and self.solver.folds > 1)
        features, s_B, losses = gather_scores(problem, s_B, self.trainer.strategy, uneven)
        self._step_weights(outer, features, s_B)
        problem.backward()
        statistics = self.weights.statistics()
        tally = gather_tally(tally, self.trainer)
        if step_policy(self, inner, features, statistics.get("effective_size"), tally):
            self.refinement.follow(tally)
        else:
            self.refinement.take_back()
            statistics = {}
        self._log_step(losses | measures(tally) | {f"weights/{name}": value for name, value in statistics.items()})

    def _ask_solver(self, problem: PolicyProblem) -> Tensor | None:
        """[B] scores of this process's rows, or `None` in a step that the solver has no part in."""
        if self.learns_weights and self.phase.runs_solver:
            return self.solver(problem)
        problem.backward()  # no weight step will come first, so the pass that trains gives the losses too
        return None

    def _step_weights(self, optimizer: Optimizer | None, features: Features, s_B: Tensor) -> None:
        """Show the weights the rows of the global window and, in a phase that learns weights, take their step."""
        self.refinement.observe(self.weights, optimizer, features)
        if self.learns_weights and self.phase.learn_weights:
            self.refinement.step(self.weights, optimizer, features, s_B)

    def _optimizers(self) -> tuple[Any, Optimizer | None]:
        """The inner optimizer as Lightning wraps it (its steps count), and the outer one raw (its steps do not)."""
        optimizers = self.optimizers()
        if isinstance(optimizers, list):
            return optimizers[0], optimizers[1].optimizer
        return optimizers, self.own_optimizer

    def _log_step(self, values: dict[str, Tensor]) -> None:
        shown = {name: value.float() for name, value in values.items()}
        bar = {"upper/loss", "lower/loss", "weights/effective_size"}
        self.log_dict({k: v for k, v in shown.items() if k in bar}, prog_bar=True)
        self.log_dict({k: v for k, v in shown.items() if k not in bar})

    def on_fit_start(self) -> None:
        begin_fit(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.guard.stop_if_asked()
        enter_phase(self)

    def on_train_start(self) -> None:
        restore_late(self, self._own_state)
        self._own_state = {}

    def on_train_epoch_end(self) -> None:
        self.weights.recount()
        if self.refinement.weights is not None:
            self.refinement.weights.recount()
        table = self.weights.table()
        self.guard.watch_table(self, table)
        self.log_dict({"weights/max": table.max().float(), "weights/min": table.min().float()})
        self.log("skipped_steps", float(self.guard.skipped))

    # ---- evaluation ----

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("monitor", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, name: str, batch: Batch) -> None:
        assert self.policy is not None
        for key, metric in self.evaluation(name, self.policy, batch).items():
            self.log(key, metric, prog_bar=key == "monitor/loss")

    def predict_step(self, batch: list[Question], batch_idx: int) -> list[dict[str, str]]:
        """Greedy answers to test prompts: dicts of `id`, `prompt` and `response`."""
        assert self.policy is not None
        if not batch:  # another process has a prompt more
            return []
        return answers(self.policy, self.tokenizer, batch, self.max_new_tokens)

    # ---- checkpoints ----

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refused, by a `UserError`: a checkpoint holds numbers only, neither the settings nor the base model."""
        raise settings_missing()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_own(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._own_state = restore_own(self, checkpoint)
