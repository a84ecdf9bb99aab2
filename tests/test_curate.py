"""Weights from a scoring pass, from a sweep at the end of their phase, and the recipe that joins them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from support.files import TOY, read_jsonl, write_jsonl
from support.mortal import Moment, Run, same
from support.policies import ROWS, UPPER_WEIGHT, batches, direction_of, made, reference, tiny_policy
from support.problems import normal, ridge_problem
from support.refining import run

from lit_bilevel import (
    BilevelDataModule,
    ClosingSweep,
    Implicit,
    LitBilevel,
    Mixing,
    NetworkWeights,
    OneStep,
    Penalty,
    Phase,
    PolicySettings,
    ScoredPrior,
    SigmoidWeights,
    SoftmaxWeights,
    UniformWeights,
    ValueFunction,
)
from lit_bilevel.callbacks.closing_sweep import pool_scores
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.policy.rest import RestingProblem
from lit_bilevel.scores.combination import combine, normal_scores, prior_weights
from lit_bilevel.scores.table import read_scores

# ---- several scores as one ----


def test_normal_scores_are_quantiles_at_the_ranks():
    values = np.array([3.0, np.nan, 1.0, 2.0, np.inf, 4.0])
    found = normal_scores(values)
    assert found[[1, 4]].tolist() == [0.0, 0.0]  # not known: decided by other columns
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.625, 0.125, 0.375, 0.875]).double())
    np.testing.assert_allclose(found[[0, 2, 3, 5]], expected.numpy(), atol=1e-12)


def test_a_monotone_change_of_a_column_changes_nothing():
    columns = {"ifd": np.random.default_rng(0).random(50), "density_ratio": np.random.default_rng(1).random(50)}
    one = combine(columns, ["ifd", "density_ratio"])
    other = combine({**columns, "density_ratio": np.log(columns["density_ratio"])}, ["ifd", "density_ratio"])
    tail = combine({**columns, "ifd": np.exp(30 * columns["ifd"])}, ["ifd", "density_ratio"])
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, tail)
    assert abs(one.mean()) < 1e-12
    assert abs(one.std() - 1) < 1e-12


def test_columns_are_turned_by_their_direction():
    columns = {"ifd": np.array([0.1, 0.5, 0.9]), "density_ratio": np.array([2.0, 1.0, 0.1])}
    assert (np.diff(combine(columns, ["ifd"])) < 0).all()
    assert (np.diff(combine(columns, ["density_ratio"])) < 0).all()
    with pytest.raises(UserError, match=r"no score 'prompt' to be added; there are: ifd, density_ratio"):
        combine(columns, ["prompt"])
    with pytest.raises(UserError, match="all rows are equal in ifd"):
        combine({"ifd": np.ones(3)}, ["ifd"])


def test_prior_weights_have_mean_one_and_the_ratio_of_their_sharpness():
    z = np.array([-1.0, 0.0, 1.0])
    weights = prior_weights(z, 2.0)
    assert abs(weights.mean() - 1) < 1e-12
    assert abs(weights[2] / weights[0] - np.exp(2.0)) < 1e-9  # σ(x)/σ(−x) = e^x
    np.testing.assert_allclose(prior_weights(z, 0.0), 1.0)


# ---- the prior ----


def test_the_weights_begin_at_the_combined_scores(small, tmp_path):
    weights = SigmoidWeights()
    module = run(small, tmp_path, ScoredPrior(sharpness=1.5), steps=4, weights=weights, solver=Mixing())
    scores = read_scores(tmp_path / "scores.parquet")
    expected = prior_weights(combine(scores.columns, ["ifd", "density_ratio"]), 1.5)
    np.testing.assert_allclose(module.weights.table().numpy(), expected, rtol=1e-5)
    assert not (tmp_path / "scores.parquet.parts").exists()
    assert scores.ids == module.trainer.datamodule.sets["pool"]["id"][:]


def test_scores_are_those_of_the_untouched_policy(small, tmp_path):
    """Under LoRA, whose adapter changes nothing at the start, they are those of the base."""
    from lit_bilevel import LoraSettings

    found = []
    for lora in (None, LoraSettings(r=2)):
        folder = tmp_path / str(lora is None)
        data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=48)
        module = LitBilevel(PolicySettings(str(TOY / "model"), lora=lora), SigmoidWeights(), Mixing())
        settings = {"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        Trainer(
            max_steps=1, default_root_dir=folder, accelerator="cpu", logger=False, callbacks=[ScoredPrior()], **settings
        ).fit(module, data)
        found.append(read_scores(folder / "scores.parquet").columns)
    for name in ("loss", "ifd", "entropy"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


class Count(Callback):
    """How many parts of the pass were scored in this run."""

    def __init__(self, monkeypatch):
        from lit_bilevel.scores.sweep import Sweep

        self.parts = 0
        original = Sweep.score

        def score(sweep, *arguments):
            self.parts += 1
            return original(sweep, *arguments)

        monkeypatch.setattr(Sweep, "score", score)


def test_a_file_of_the_same_rows_and_policy_is_read_and_another_is_not(small, tmp_path, monkeypatch):
    """A run that was killed after its pass and before its first checkpoint does not score again."""
    count = Count(monkeypatch)
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    once = count.parts
    assert once > 0
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    assert count.parts == once
    fewer = {**small, "pool": write_jsonl(tmp_path / "fewer.jsonl", read_jsonl(Path(small["pool"]))[:60])}
    run(fewer, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    assert count.parts > once


def test_a_file_can_be_given_and_is_joined_by_id(small, tmp_path, monkeypatch):
    run(small, tmp_path, ScoredPrior(), steps=1, solver=Mixing())
    count = Count(monkeypatch)
    records = read_jsonl(Path(small["pool"]))
    turned = {**small, "pool": write_jsonl(tmp_path / "turned.jsonl", records[::-1])}
    scores = str(tmp_path / "scores.parquet")
    module = run(turned, tmp_path / "other", ScoredPrior(scores=scores), steps=1, solver=Mixing())
    assert count.parts == 0
    known = read_scores(scores)
    expected = dict(zip(known.ids, combine(known.columns, ["ifd", "density_ratio"]), strict=True))
    ids = module.trainer.datamodule.sets["pool"]["id"][:]
    order = np.argsort([expected[key] for key in ids])
    assert (np.diff(module.weights.table().numpy()[order]) >= -1e-6).all()
    more = {
        **small,
        "pool": write_jsonl(tmp_path / "more.jsonl", [*records, {**records[0], "id": "new", "prompt": "?"}]),
    }
    with pytest.raises(UserError, match="has no scores for 1 of 91 pool rows"):
        run(more, tmp_path / "more", ScoredPrior(scores=scores), steps=1, solver=Mixing())


def test_a_column_that_no_row_has_is_told(small, tmp_path):
    few = {**small, "validation": write_jsonl(tmp_path / "few.jsonl", read_jsonl(Path(small["validation"]))[:9])}
    with pytest.warns(UserWarning, match="no row has a `density_ratio`, so the prior is without it"):
        run(few, tmp_path, ScoredPrior(), steps=1, solver=Mixing())


def test_what_has_no_prior_is_refused(small, tmp_path):
    with pytest.raises(UserError, match=r"`columns` are weight; there are: loss, .*density_ratio"):
        ScoredPrior(columns=["weight"])
    with pytest.raises(UserError, match="`sharpness` is nan"):
        ScoredPrior(sharpness=float("nan"))
    trainer = Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(UserError, match="make the scores by `lit-bilevel score` and give the file as its `scores`"):
        ScoredPrior().setup(trainer, None, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`UniformWeights` are equal"):
        run(small, tmp_path, ScoredPrior(), steps=1, weights=UniformWeights(), solver=Mixing())


# ---- weights that read scores ----


def test_a_network_tells_rows_apart_by_their_scores(small, tmp_path):
    """What it learns of some rows by their column is known of the others."""
    from lit_bilevel.types import Features

    weights = NetworkWeights(columns=["ifd"])
    weights.build(torch.zeros(40, dtype=torch.int64))
    column_N = torch.linspace(-2, 2, 40)
    weights.set_columns(column_N[:, None])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    visited = torch.arange(0, 40, 2)
    ones = torch.ones(20)
    features = Features(visited, torch.zeros_like(visited), ones.long(), ones)
    for _ in range(60):
        weights.observe(features)
        weights.set_gradient(features, -column_N[visited].double())
        optimizer.step()
        optimizer.zero_grad()
    rest = torch.arange(1, 40, 2)
    unseen = weights(Features(rest, torch.zeros_like(rest), ones.long(), ones))
    assert (unseen.diff() > 0).all()
    assert unseen[-1] > 2 * unseen[0]


def test_columns_are_given_by_the_pass_and_of_the_right_shape(small, tmp_path):
    weights = NetworkWeights(columns=["ifd", "loss"])
    module = run(small, tmp_path, ScoredPrior(), steps=2, weights=weights)
    scores = read_scores(tmp_path / "scores.parquet").columns
    expected = np.stack([-normal_scores(scores["ifd"]), -normal_scores(scores["loss"])], axis=1)
    np.testing.assert_allclose(module.weights.column_NF.numpy(), expected, rtol=1e-6)
    with pytest.raises(
        UserError, match=r"the shape \(3, 1\), .* give finite ones \(90, 2\), a column for each of: ifd"
    ):
        module.weights.set_columns(torch.zeros(3, 1))
    with pytest.raises(UserError, match="`SigmoidWeights` read no scores of rows; use `NetworkWeights`"):
        SigmoidWeights().set_columns(torch.zeros(3, 1))
    with pytest.raises(UserError, match="`columns` of the weights names 'pm'"):
        run(small, tmp_path, ScoredPrior(), steps=2, weights=NetworkWeights(columns=["pm"]))
    with pytest.raises(UserError, match=r"`columns` of `model.weights` are ifd, and .* `ScoredPrior`"):
        run(small, tmp_path, Callback(), steps=2, weights=NetworkWeights(columns=["ifd"]))


# ---- scores at rest ----


@pytest.mark.parametrize(("solver", "steps"), [(ValueFunction(), 3), (OneStep(), 3), (Penalty(), 1)])
def test_scores_at_rest_are_those_of_the_closed_form(solver, steps):
    """Of the state that some steps left: neither the state nor the scores change when they are asked for twice."""
    problem = ridge_problem(0.4)
    for _ in range(steps):
        solver(problem)
        problem.theta = problem.theta + 0.1 * normal(4, seed=steps)
    first, second = solver.scores_at_rest(problem), solver.scores_at_rest(problem)
    assert torch.equal(first, second)
    gamma = 0.6 / 0.4
    if isinstance(solver, ValueFunction):
        expected = gamma * (problem.lower_losses() - problem.lower_losses_at(solver._values))
    elif isinstance(solver, Penalty):
        expected = gamma * problem.lower_losses()
    else:
        mean = solver._running.average[0] / (1 - solver.direction_decay ** float(solver._running.gradients))
        expected = -problem.lower_jvp([mean])
    torch.testing.assert_close(first, expected)


def test_a_solver_that_has_not_begun_scores_nothing():
    problem = ridge_problem(0.4)
    for solver in (ValueFunction(), OneStep()):
        assert not solver.scores_at_rest(problem).any()
    for solver in (Mixing(), Implicit()):
        with pytest.raises(UserError, match="has no scores at rest; use `ValueFunction`"):
            solver.scores_at_rest(problem)


@pytest.mark.parametrize("solver", [ValueFunction(), OneStep(), Penalty()])
def test_rows_at_rest_are_scored_as_one_by_one(solver):
    """In float64: in one batch, row by row, and by the problem of a training step."""
    policy = tiny_policy().double()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-2)
    step = made(policy, optimizer=optimizer)
    solver(step)
    if isinstance(solver, ValueFunction):
        solver._values = [v + 0.1 * d for v, d in zip(solver._values, direction_of(policy), strict=True)]

    def rest(batch):
        return RestingProblem(policy, batch, UPPER_WEIGHT, optimizer, step.engine, step.lower_objective)

    whole = torch.cat([solver.scores_at_rest(rest(batch)) for batch in batches(1, ROWS)])
    alone = torch.cat([solver.scores_at_rest(rest(batch)) for batch in batches(1, 1)])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-9)
    assert whole.std() > 0
    at = solver._values if isinstance(solver, ValueFunction) else step.values()
    if not isinstance(solver, OneStep):
        plain, _ = reference(policy, 1)
        with policy.substituted(at):
            other, _ = reference(policy, 1)
        gamma = (1 - UPPER_WEIGHT) / UPPER_WEIGHT
        torch.testing.assert_close(whole, gamma * (plain - other if isinstance(solver, ValueFunction) else plain))


# ---- the sweep ----

LEARN = Phase("weights", 0.5, upper_weight=0.9, learning_rate=0.5)
TRAIN = Phase("policy", 0.5, upper_weight=0.25, learning_rate=1.0, learn_weights=False)


class Settled(Callback):
    """Steps after which weights were set, and from what."""

    def __init__(self, monkeypatch):
        self.steps, self.scores = [], []
        original = ClosingSweep.sweep

        def sweep(callback, trainer, module, upper_weight):
            self.steps.append((trainer.global_step, upper_weight))
            self.scores.append(pool_scores(trainer, module, upper_weight))
            original(callback, trainer, module, upper_weight)

        monkeypatch.setattr(ClosingSweep, "sweep", sweep)


def test_the_sweep_is_at_the_end_of_its_phase_and_sets_the_weights(small, tmp_path, monkeypatch):
    settled = Settled(monkeypatch)
    weights = SoftmaxWeights()
    module = run(
        small,
        tmp_path,
        ClosingSweep("weights", strength=2.0),
        steps=8,
        weights=weights,
        solver=ValueFunction(),
        phases=[LEARN, TRAIN],
    )
    assert settled.steps == [(4, 0.9)]
    (score_N,) = settled.scores
    assert score_N.isfinite().all()
    centred = score_N - score_N.mean()
    expected = (-(centred / centred.abs().mean()).clamp(-3, 3) / 2.0).softmax(0) * 90
    torch.testing.assert_close(module.weights.table(), expected, rtol=1e-5, atol=1e-8)


def test_the_sweep_of_a_run_without_phases_is_at_its_end(small, tmp_path, monkeypatch):
    settled = Settled(monkeypatch)
    run(small, tmp_path, ClosingSweep(), steps=5, solver=OneStep())
    assert settled.steps == [(5, 0.5)]


def test_a_sweep_that_has_nothing_to_set_is_refused(small, tmp_path):
    phases = [LEARN, TRAIN]
    for callback, settings, message in (
        (ClosingSweep("policy"), {"phases": phases}, "the phase 'policy', which learns no weights"),
        (ClosingSweep("all"), {"phases": phases}, "there is no phase 'all' in `model.phases`; there are: weights"),
        (ClosingSweep(), {"weights": NetworkWeights()}, "`OneStep` with `NetworkWeights`; use `ValueFunction`"),
        (ClosingSweep(), {"solver": Mixing()}, "`Mixing` with `SoftmaxWeights`"),
    ):
        with pytest.raises(UserError, match=message):
            run(small, tmp_path, callback, steps=2, **settings)
    with pytest.raises(UserError, match="`strength` of `ClosingSweep` is 0"):
        ClosingSweep(strength=0)


# ---- the recipe ----


def curate_flags(small: dict[str, str], folder: Path, *more: str) -> list[str]:
    """Two epochs of 12 steps, the border after the eighth, validation after every fourth."""
    return [
        "--config=configs/curate.yaml",
        *(f"--data.{name}={path}" for name, path in small.items()),
        f"--model.policy.path={TOY / 'model'}",
        "--model.policy.lora=null",
        "--data.batch_size=8",
        "--data.max_length=64",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.val_check_interval=4",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_n_steps=1",
        "--figures.enabled=false",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    killed = Run(curate_flags(small, folder / "run"), folder / "log")
    assert killed.wait() == [0], killed.text()
    return folder / "run"


BORDERS = [
    Moment("part of the scores", 2),
    Moment("scores"),
    Moment("prior"),
    Moment("forward", 2),  # before φ is on its way
    Moment("step", 5),
    Moment("sweep"),
    Moment("settled"),
    Moment("checkpoint", 1),
    Moment("settled"),
    Moment("forward", 2),
    Moment("half a checkpoint", 2),
    Moment("policy"),
]


def test_kills_at_every_border_change_no_bit(small, whole, tmp_path):
    flags = curate_flags(small, tmp_path / "killed")
    log = tmp_path / "log"
    for moment in BORDERS:
        killed = Run(flags, log, moment=moment)
        ends = killed.wait()
        assert ends == [-moment.number], f"{moment} {ends}: {killed.text()}"
    last = Run(flags, log)
    assert last.wait() == [0], last.text()
    same(whole, tmp_path / "killed")
    assert log.read_text().count("parts are known from") >= 1


REFINED = (
    "--trainer.max_epochs=4",
    "--trainer.callbacks+=SelfRefine",
    "--trainer.callbacks.every_n_steps=6",
    "--trainer.callbacks.start=32",
    "--trainer.callbacks.sampling.max_new_tokens=8",
)


@pytest.mark.slow
def test_ten_kills_at_random_times_change_no_bit(small, tmp_path):
    """With refinement on; at a tenth of the time that a run takes by itself, on average, after the last kill."""
    flags = curate_flags(small, tmp_path / "whole", *REFINED)
    began = time.monotonic()
    undisturbed = Run(flags, tmp_path / "log of the whole")
    assert undisturbed.wait() == [0], undisturbed.text()
    seconds = time.monotonic() - began
    flags, log, draw = curate_flags(small, tmp_path / "killed", *REFINED), tmp_path / "log", random.Random(0)
    kills = 0
    while kills < 10:
        attempt = Run(flags, log)
        end = time.monotonic() + draw.uniform(0.1, 0.4) * seconds
        while attempt.alive() and time.monotonic() < end:
            time.sleep(0.01)
        if not attempt.alive():
            break
        attempt.kill()
        attempt.wait()
        kills += 1
    last = Run(flags, log)
    assert last.wait() == [0], last.text()
    assert kills >= 5, f"only {kills} kills came in time"
    same(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed" / "responses.jsonl").read_text().count("\n") > 0


@pytest.mark.slow
def test_two_processes_curate_as_one_does(small, tmp_path):
    """The whole recipe with refinement; batches are halved, so that a step sees the same rows."""
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4"]
    for folder, processes, more in (("one", 1, []), ("two", 2, two)):
        done = Run(curate_flags(small, tmp_path / folder, *REFINED, *more), tmp_path / f"{folder}.log", processes)
        assert done.wait() == [0] * processes, done.text()
    one, other = (pq.read_table(tmp_path / folder / "weights.parquet") for folder in ("one", "two"))
    assert one["id"] == other["id"]
    assert one["visits"] == other["visits"]
    assert np.allclose(one["weight"], other["weight"], rtol=1e-3)
    losses = [json.loads((tmp_path / folder / "metrics.json").read_text())["test/loss"] for folder in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_recipe_says_what_it_does(whole):
    told = (whole.parent / "log").read_text()
    for text in (
        "scored 90 pool rows in",
        "the weights begin at ifd + density_ratio, effective size",
        "phase 2 of 3, weights:",
        "all 90 rows were scored once more",
        "phase 3 of 3, policy:",
    ):
        assert told.count(text) == 1, text


def test_the_recipe_in_python(small, tmp_path):
    """The ten lines of the documentation."""
    phases = [
        Phase("weights", 1 / 3, upper_weight=0.95, learning_rate=0.02),
        Phase("policy", 2 / 3, upper_weight=0.25, learning_rate=1.0, learn_weights=False),
    ]
    module = LitBilevel(
        PolicySettings(str(TOY / "model")), SigmoidWeights(), ValueFunction(learning_rate=1e-3), phases=phases
    )
    data = BilevelDataModule(small["pool"], small["validation"], batch_size=8, max_length=64)
    trainer = Trainer(
        max_steps=6,
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[ScoredPrior(), ClosingSweep("weights")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    assert module.weights.table().std() > 0.1


def test_refinement_after_the_weights(small, tmp_path):
    """The fourth part, where it is asked for."""
    refine = ["--trainer.callbacks+=SelfRefine", "--trainer.callbacks.every_n_steps=4", "--trainer.callbacks.start=16"]
    flags = curate_flags(small, tmp_path, *refine, "--trainer.callbacks.sampling.max_new_tokens=8")
    assert main(["fit", *flags]) == 0
    assert (tmp_path / "responses.jsonl").read_text().count("\n") > 0
