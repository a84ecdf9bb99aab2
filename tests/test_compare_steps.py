"""Policy steps and seconds of compared runs: which they take, and how the table tells them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.comparing import Killed

from lit_bilevel.comparison.methods import Method
from lit_bilevel.comparison.run import Runner
from lit_bilevel.comparison.table import markdown
from lit_bilevel.comparison.variants import Variant
from lit_bilevel.errors import UserError


def runner_of(rows=(), **known):
    """A runner that knows these things, and these finished runs."""
    runner = Runner.__new__(Runner)
    runner.variants, runner.sets = {}, {"pool": range(100)}
    runner.settings = SimpleNamespace(
        data=SimpleNamespace(batch_size=8), model=SimpleNamespace(accumulate_grad_batches=2)
    )
    runner.results = SimpleNamespace(find=lambda name, seed: dict(rows)[name])
    runner.__dict__.update(known)
    return runner


def test_every_run_takes_the_steps_of_the_shortest_limit():
    def steps(max_steps, max_epochs):
        trainer = SimpleNamespace(max_steps=max_steps, max_epochs=max_epochs, limit_train_batches=1.0)
        return runner_of()._run_steps(trainer)

    assert [steps(-1, 2), steps(5000, 2), steps(5, 2), steps(5000, -1), steps(5000, None)] == [14, 14, 5, 5000, 5000]
    with pytest.raises(UserError, match="no run would end by its steps"):
        steps(-1, None)


def test_steps_that_a_variant_sets_are_its_own():
    epoch = "--model.upper_weight_decay_every=7"
    shared = ["--trainer.max_steps=14", "--trainer.max_epochs=-1", epoch]
    flags = {None: shared, "max_steps": shared[1:2], "max_epochs": []}
    for own, wanted in flags.items():
        variant = Variant("oracle", flags={f"trainer.{own}": 3}) if own else None
        assert runner_of(steps=14)._as_many_steps(variant) == wanted


def test_a_filter_scores_under_the_settings_of_its_method(monkeypatch, tmp_path):
    asked = []

    def built(config, flags):
        asked.extend(flags)
        raise Killed

    monkeypatch.setattr("lit_bilevel.comparison.run.build", built)
    method = Method.parse("mine", {"mine": Variant("lowest_loss", flags={"data.max_length": 9})})
    with pytest.raises(Killed):
        runner_of(config="c", shared=["--a"])._choose(method, ["--b"], tmp_path, None, 0)
    assert asked[0] == "--a"
    assert asked[-3:] == ["--data.max_length=9", "--b", "--seed_everything=0"]


def test_a_run_that_several_need_is_timed_once():
    seconds = {"one_step": 10.0, "two_stage:one_step": 14.0, "weighted:one_step": 15.0, "mixing": 2.0}
    rows = [(name, {"method": name, "seconds": value, "monitor_loss": value}) for name, value in seconds.items()]
    name = f"best:{','.join(seconds)}"
    found = runner_of(rows)._best(name, Method.parse(name), 0)
    assert (found["chosen"], found["seconds"]) == ("mixing", 10 + 4 + 5 + 2)


def test_a_table_says_how_many_steps_where_they_differ():
    losses = {name: {0: np.ones(3)} for name in ("mixing", "slow")}

    def text(steps):
        rows = [{"method": n, "seed": 0, "test_loss": 1.0, "seconds": 1.0, "steps": s} for n, s in steps.items()]
        return markdown(rows, losses, {}, "command")

    assert "200 policy steps a run" in text({"mixing": 200, "slow": 200})
    assert "| steps |" not in text({"mixing": 200, "slow": 200})
    different = text({"mixing": 200, "slow": 375})
    assert "| steps |" in different
    assert "| 375 |" in different
    assert "policy steps a run" not in different


def test_the_best_of_runs_that_never_looked_is_refused():
    runner = SimpleNamespace(row=lambda name, seed: {"method": name, "seconds": 1.0})
    with pytest.raises(UserError, match=r"never looked at in mixing, one_step.*val_check_interval"):
        Runner._best(runner, "best:mixing,one_step", Method.parse("best:mixing,one_step"), 0)
