"""Methods in whole runs: weightings and solvers fit and export, also those from outside the repository."""

from __future__ import annotations

import json
import re
import sys

import pyarrow.parquet
import pytest
import torch
from support.files import ROOT

from lit_bilevel.cli import main
from lit_bilevel.inspection.curves import read_curves
from lit_bilevel.inspection.folder import read_lines

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def table_of(folder):
    return pyarrow.parquet.read_table(folder / "weights.parquet").to_pydict()


def fitted(flags, tmp_path, *more, name="run"):
    arguments = ["fit", *flags, "--export.policy=false", f"--trainer.default_root_dir={tmp_path / name}", *more]
    assert main(arguments) == 0
    return table_of(tmp_path / name)


RUNS = {
    "value_function": ["--model.solver=ValueFunction"],
    "implicit": ["--model.solver=Implicit", "--model.solver.iterations=2", "--model.solver.damping=1.0"],
    "bmo": ["--model.weights=BMOWeights", "--model.solver=Mixing"],
    "network": ["--model.weights=NetworkWeights"],
    "sigmoid": [
        "--model.weights=SigmoidWeights",
        "--model.weights.keep=0.5",
        "--model.weights.cap=3",
        "--model.weight_optimizer=torch.optim.SparseAdam",
        "--model.weight_optimizer.lr=0.1",
        "--model.weight_optimizer.eps=1.0",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_exports_weights_of_mean_one(name, flags, tmp_path):
    weights = torch.tensor(fitted(flags, tmp_path, *RUNS[name])["weight"], dtype=torch.float64)
    assert abs(weights.mean() - 1) < 1e-6
    assert weights.min() >= 0
    assert len(weights.unique()) > 10


def test_what_was_seen_at_the_end_is_what_is_exported(flags, tmp_path):
    weights = fitted(flags, tmp_path, "--model.weights.keep=0.5")["weight"]
    (*_, last) = read_lines(tmp_path / "run" / "inspection" / "epochs.jsonl")
    assert last["weights"] == pytest.approx([weights[row] for row in last["rows"]], abs=1e-12)


@pytest.mark.filterwarnings("ignore:the run in .* is finished")
def test_a_finished_fit_with_weights_from_losses_is_continued(flags, tmp_path):
    """As after a kill in the test that ends a run."""
    first = fitted(flags, tmp_path, *RUNS["bmo"])
    (tmp_path / "run" / "metrics.json").unlink()
    assert fitted(flags, tmp_path, *RUNS["bmo"], "--ckpt_path=last") == first
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    curves = read_curves(tmp_path / "run")  # where the tab HParams takes its metrics from
    assert curves["auroc/all"][-1][1] == pytest.approx(metrics["auroc/all"], abs=1e-6)


@pytest.mark.slow  # test_ranks.py has the same in fewer steps
def test_accumulation_changes_nothing_for_bmo(flags, tmp_path):
    common = [*RUNS["bmo"], "--trainer.precision=64-true"]
    whole = fitted(flags, tmp_path, *common, "--data.batch_size=8", name="whole")
    parts = fitted(flags, tmp_path, *common, "--data.batch_size=2", "--model.accumulate_grad_batches=4", name="parts")
    assert whole["weight"] == pytest.approx(parts["weight"], rel=1e-4)


def test_warm_start_takes_weights_by_id(flags, tmp_path, capsys):
    first = fitted(flags, tmp_path, name="first")
    again = [
        "--trainer.callbacks+=WarmStart",
        f"--trainer.callbacks.weights={tmp_path / 'first' / 'weights.parquet'}",
        "--model.solver=Mixing",
    ]
    second = fitted(flags, tmp_path, *again, name="second")
    assert second["weight"] == pytest.approx(first["weight"], rel=1e-5)
    start, end = read_lines(tmp_path / "second" / "inspection" / "epochs.jsonl")
    assert (start["step"], start["weights"]) == (0, pytest.approx(end["weights"], rel=1e-5))
    assert start["weights"] == pytest.approx([first["weight"][row] for row in start["rows"]], rel=1e-5)
    rows = read_lines(tmp_path / "second" / "inspection" / "rows.jsonl")
    assert all(row["moved"] == 0 and row["before"] == pytest.approx(row["weight"], rel=1e-5) for row in rows)
    again[1] = "--trainer.callbacks.weights=nowhere.parquet"
    assert main(["fit", *flags, *again]) == 2
    assert "nowhere.parquet does not exist" in capsys.readouterr().err


def test_an_unsafe_weight_optimizer_is_refused(flags, capsys):
    status = main(["fit", *flags, "--model.weight_optimizer=torch.optim.AdamW"])
    assert status == 2
    assert "`AdamW` is not safe for `SoftmaxWeights`" in capsys.readouterr().err


def test_bmo_without_validation_is_refused(flags, capsys):
    assert main(["fit", *flags, *RUNS["bmo"], "--model.upper_weight=0"]) == 2
    assert "`BMOWeights` has no meaning" in capsys.readouterr().err


def test_the_example_of_contributing_works(flags, tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    methods = [part for part in code.split("class ")[1:] if part.strip()]
    assert all(len(part.strip().splitlines()) <= 10 for part in methods)
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = re.findall(r"^    lit-bilevel fit .*(--model.weights .*)$", text, flags=re.MULTILINE)
    try:
        weights = torch.tensor(fitted(flags, tmp_path, *command.split())["weight"], dtype=torch.float64)
    finally:
        sys.modules.pop("my_methods", None)
    assert abs(weights.mean() - 1) < 1e-6
    assert len(weights.unique()) > 10


@pytest.mark.parametrize(
    "name", ["bmo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("value_function", "network", "sigmoid"))]
)
def test_a_resumed_run_ends_with_the_same_weights(name, flags, tmp_path):
    flags = [*flags, *RUNS[name], "--trainer.max_epochs=2", "--checkpoint.every_n_steps=1"]
    whole = fitted(flags, tmp_path, name="whole")
    fitted(flags, tmp_path, "--trainer.max_steps=14", name="parts")
    assert fitted(flags, tmp_path, "--ckpt_path=last", name="parts") == whole
