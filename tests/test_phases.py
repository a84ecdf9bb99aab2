"""Phases of a run: shares, λ, learning rates and what a step costs, each a function of the step's number."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from support.files import ROOT, TOY
from support.refining import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import get_scheduler

from lit_bilevel import BMOWeights, LitBilevel, Mixing, OneStep, Penalty, Phase, PolicySettings, SigmoidWeights
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.page import page
from lit_bilevel.inspection.run import read
from lit_bilevel.inspection.terminal import text
from lit_bilevel.solvers import ValueFunction
from lit_bilevel.training.optimizers import make_optimizers
from lit_bilevel.training.phases import borders, index_at, index_of
from lit_bilevel.training.refusals import check_run

LEARN = Phase("weights", 0.4, upper_weight=0.95, learning_rate=0.02)
TRAIN = Phase("policy", 0.6, upper_weight=0.25, learning_rate=1.0, learn_weights=False)


# ---- where ----


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97, 1000])
def test_every_step_is_in_one_phase_and_none_is_longer_than_its_share_by_a_step(steps):
    phases = [Phase("a", 0.1), Phase("b", 0.83), Phase("c", 0.07)]
    indices = [index_at(phases, step, steps) for step in range(steps)]
    assert indices == sorted(indices)
    counts = [indices.count(index) for index in range(3)]
    assert sum(counts) == steps
    assert all(abs(count - phase.share * steps) < 1 + 1e-6 for count, phase in zip(counts, phases, strict=True))
    assert [sum(counts[: i + 1]) for i in range(3)] == borders(phases, steps)


def test_a_border_is_the_first_step_at_or_after_its_share():
    """Steps were counted so for `weight_start`; 0.1 + 0.83 is a little less than 0.93."""
    assert borders([Phase("a", 0.1), Phase("b", 0.83), Phase("c", 0.07)], 1000) == [100, 930, 1000]
    assert borders([Phase("a", 0.1), Phase("b", 0.83), Phase("c", 0.07)], 1255) == [126, 1168, 1255]


def test_a_run_without_an_end_has_one_phase():
    assert index_at([Phase("a", 1.0)], 10**9, float("inf")) == 0


BAD = {
    "shares": ([Phase("a", 0.5), Phase("b", 0.4)], r"shares of `model.phases` come to 0.9; they must come to 1"),
    "no share": ([Phase("a", 0.0), Phase("b", 1.0)], r"`share` of the phase 'a' is 0.0; it must be in \(0, 1\]"),
    "nan": ([Phase("a", float("nan")), Phase("b", 1.0)], r"`share` of the phase 'a' is nan"),
    "names": ([Phase("a", 0.5), Phase("a", 0.5)], r"has 'a' more than once"),
    "no name": ([Phase("", 1.0)], r"no `name`"),
    "λ": ([Phase("a", 1.0, upper_weight=1.0)], r"it must be in \[0, 1\), or 1 where the solver does not run"),
    "rate": ([Phase("a", 1.0, learning_rate=-1.0)], r"`learning_rate` of the phase 'a' is -1.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_phases_without_a_meaning_are_refused(name):
    phases, message = BAD[name]
    with pytest.raises(UserError, match=message):
        made(phases)


def test_a_solver_needs_the_upper_level_in_the_phases_in_which_it_runs():
    zero = Phase("pool", 0.5, upper_weight=0.0, learn_weights=False)
    made([zero, Phase("weights", 0.5)], solver=Penalty())
    for phase in (Phase("pool", 0.5, 0.0), Phase("pool", 0.5, 0.0, learn_weights=False, prepare_solver=True)):
        with pytest.raises(UserError, match=r"of the phase 'pool' is 0.0, so λ is 0 in some step, where `Penalty` has"):
            made([phase, Phase("weights", 0.5)], solver=Penalty())
    with pytest.raises(UserError, match="where `BMOWeights` has no meaning"):  # they weigh in every step
        made([zero, Phase("weights", 0.5)], solver=Mixing(), weights=BMOWeights())


def test_a_name_that_no_phase_has_is_told_with_those_there_are():
    with pytest.raises(UserError, match=r"no phase 'weigths' in `model.phases`; there are: weights, policy"):
        index_of([LEARN, TRAIN], "weigths")


def made(phases, solver=None, weights=None, steps=0, **settings):
    """A `LitBilevel` with phases, under a Trainer that knows its length alone."""
    policy = PolicySettings(str(TOY / "model"))
    module = LitBilevel(policy, weights or SigmoidWeights(), solver or OneStep(), phases=phases, **settings)
    module._trainer = SimpleNamespace(
        estimated_stepping_batches=steps, strategy=SingleDeviceStrategy("cpu"), precision="32-true", callbacks=[]
    )
    return module


def test_shares_of_a_run_whose_length_is_not_known_are_refused():
    module = made([LEARN, TRAIN])
    module._trainer.max_epochs = module._trainer.max_steps = -1
    with pytest.raises(UserError, match=r"shares of a run whose length is not known; set `trainer.max_steps`"):
        check_run(module, "fit")


# ---- the learning rate ----


def rates(phases, steps, **settings) -> list[float]:
    """The policy's learning rate in every step."""
    optimizer = partial(torch.optim.AdamW, lr=0.5)
    module = made(phases, steps=steps, optimizer=optimizer, **settings)
    value = torch.nn.Parameter(torch.zeros(1))
    module.policy = SimpleNamespace(trainable=lambda: [value])  # type: ignore[assignment]
    module.weights.build(torch.zeros(4, dtype=torch.int64))
    (inner, _), (made_schedule,) = make_optimizers(module)
    scheduler = made_schedule["scheduler"]
    found = []
    for _ in range(steps):
        found.append(inner.param_groups[0]["lr"])
        inner.step()
        scheduler.step()
    return found


def reference(name: str, warmup: int, steps: int, rate: float) -> list[float]:
    """The schedule of transformers over so many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(name, optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "inverse_sqrt"])
def test_each_phase_with_a_rate_has_the_schedule_over_its_own_length(name):
    settings = {"lr_scheduler": name, "warmup_steps": 5}
    found = rates([LEARN, TRAIN], 60, **settings)
    assert found == [*reference(name, 5, 24, 0.5 * 0.02), *reference(name, 5, 36, 0.5)]


def test_phases_without_a_rate_go_on_with_the_schedule_before_them():
    phases = [Phase("a", 0.1), Phase("b", 0.4), Phase("c", 0.25, learning_rate=0.1), Phase("d", 0.25)]
    settings = {"lr_scheduler": "linear", "warmup_steps": 3}
    assert rates([*phases[:2], Phase("rest", 0.5)], 40, **settings) == reference("linear", 3, 40, 0.5)
    assert rates(phases, 40, **settings) == [*reference("linear", 3, 20, 0.5), *reference("linear", 3, 20, 0.05)]


def test_a_schedule_that_follows_a_metric_is_refused():
    with pytest.raises(UserError, match=r"greedy, which follows a metric"):
        made([LEARN, TRAIN], lr_scheduler="greedy")


# ---- λ ----


@pytest.mark.parametrize(("name", "first", "last"), [("quality", 0.1, 0.93), ("safety", 0.1, 0.8)])
def test_recipes_with_phases_are_what_they_were_with_starts(name, first, last):
    """λ 0 until a share of the run was done, weights from a share on, one schedule of the learning rate."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]
    phases = [Phase(**phase) for phase in config["phases"]]
    schedule = {k: config[k] for k in ("lr_scheduler", "lr_scheduler_kwargs", "warmup_steps")}
    module = made(phases, steps=1255, upper_weight=config["upper_weight"])
    for step in range(1255):
        module._trainer.global_step = step
        index = index_at(phases, step, 1255)
        assert phases[index].runs_solver
        assert phases[index].learn_weights == (step / 1255 >= first)
        assert (phases[index].upper_weight is None) == (step / 1255 >= last)
    assert rates(phases, 1255, **schedule) == rates(None, 1255, **schedule)


# ---- in a run ----


class Watch(Callback):
    """What holds in every step."""

    def __init__(self, solver):
        self.calls, self.upper, self.weights, self.state = [], [], [], []
        self._solve, self._count = solver.weight_gradient, 0
        solver.weight_gradient = self._counted

    def _counted(self, problem):
        self._count += 1
        return self._solve(problem)

    def on_train_batch_start(self, trainer, pl_module, *rest):
        self.upper.append(pl_module.current_upper_weight)
        self.before = pl_module.weights.table().clone()
        self._count = 0

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.calls.append(self._count)
        self.weights.append(not torch.equal(self.before, pl_module.weights.table()))
        self.state.append(bool(pl_module.solver.state_dict()))


def test_a_phase_without_learning_asks_no_solver_and_frees_what_it_kept(small, tmp_path):
    train = Phase("policy", 0.5, 0.25, learn_weights=False, learning_rate=1.0)
    phases = [Phase("pool", 0.25, 0.9, False, prepare_solver=True), Phase("weights", 0.25, 0.8), train]
    solver = ValueFunction()
    watch = Watch(solver)
    module = run(small, tmp_path, watch, steps=12, solver=solver, phases=phases)
    assert watch.upper == [0.9] * 3 + [0.8] * 3 + [0.25] * 6
    assert watch.calls == [1] * 6 + [0] * 6
    assert watch.weights == [False] * 3 + [True] * 3 + [False] * 6
    assert watch.state == [True] * 6 + [False] * 6
    assert module.solver.state_dict() == {}  # which is what a checkpoint holds of it


def test_the_phase_is_told_and_can_be_looked_up(flags, tmp_path):
    """A scalar, a text in TensorBoard, a line of the run, and what `inspect` says of an unfinished or finished run."""
    phases = [vars(LEARN), vars(TRAIN)]
    assert main(["fit", *flags, "--trainer.max_steps=10", f"--model.phases={json.dumps(phases)}"]) == 0
    report = read(tmp_path / "run")
    assert [value for _, value in report.curves["phase"]] == [0.0] * 4 + [1.0] * 6
    assert report.phase() == "phase 2 of 2, policy: 60% of the steps, λ = 0.25, learning rate × 1, weights stay"
    assert report.phase() in text(report)
    assert "phase 2 of 2, policy" in page(report)
    files = (tmp_path / "run").glob("events.out.tfevents.*")
    boards = [EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload() for file in files]
    told = [board.Tensors("phase/text_summary") for board in boards if "phase/text_summary" in board.Tags()["tensors"]]
    assert [event.step for event in told[0]] == [0, 4]
