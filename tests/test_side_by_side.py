"""Runs of a comparison in processes of their own, against the same runs one after another."""

from __future__ import annotations

import pytest
from support.comparing import compare, table_of

METHODS = ("weighted:one_step@softmax", "best:mixing,mixing@0.5")


def test_runs_side_by_side_are_those_one_after_another(small, tmp_path):
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        folder.mkdir()
        assert compare(small, folder, "--methods", *METHODS, "--max_steps", "2", "--jobs", jobs) == 0
    one, two = table_of(tmp_path / "1"), table_of(tmp_path / "2")
    assert one.keys() == two.keys() >= {*METHODS, "one_step@softmax", "mixing", "mixing@0.5"}
    for name in one:
        for column in ("test_loss", "monitor_loss", "steps", "auroc/all"):
            assert one[name][column] == two[name][column], (name, column)
    assert float(two["weighted:one_step@softmax"]["seconds"]) > float(two["one_step@softmax"]["seconds"])


def test_a_run_that_fails_costs_those_that_need_it_and_no_others(small, tmp_path, capfd):
    variants = tmp_path / "variants.yaml"
    variants.write_text("broken: {method: one_step@softmax, flags: {model.weights.temperature: 0}}\n")
    methods = ("weighted:broken", "mixing")
    output = tmp_path / "output"
    assert compare(small, output, "--methods", *methods, "--jobs", "2", "--variants", str(variants)) == 2
    told = capfd.readouterr()
    assert "`temperature` is 0.0" in told.out
    assert "broken, which it needs, failed" in told.out
    assert "1 of the runs failed: weighted:broken (seed 0)" in told.err
    assert set(table_of(output)) == {"mixing"}


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_jobs_below_one_are_refused(small, tmp_path, capfd, jobs):
    assert compare(small, tmp_path, "--methods", "mixing", "--jobs", jobs) == 2
    assert "`--jobs` is" in capfd.readouterr().err
