"""The main job end to end on small toy data: the run folder, its results, a second run in it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from support.files import read_jsonl, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel import LitBilevel
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.curves import read_curves
from lit_bilevel.inspection.truth import read_truth

STEP_TAGS = ["upper/loss", "lower/loss", "lower/weighted_loss", "weights/effective_size", "weights/entropy"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """A finished run on the small data."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [
        "fit",
        "--config=configs/quickstart.yaml",
        *(f"--data.{name}={path}" for name, path in small.items()),
        "--data.batch_size=8",
        "--trainer.max_epochs=2",
        "--trainer.val_check_interval=6",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={folder}",
    ]
    assert main(arguments) == 0
    return folder


def test_the_run_folder_is_complete(finished):
    for name in (
        "config.yaml",
        "weights.parquet",
        "metrics.json",
        "policy",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    ):
        assert (finished / name).exists(), name
    assert not list(finished.rglob("*.partial"))


def test_weights_are_joined_to_the_data_by_id(finished, small):
    table = pyarrow.parquet.read_table(finished / "weights.parquet")
    assert table.column_names == ["id", "row", "source", "weight", "weight_refined", "visits"]
    assert table["id"].to_pylist() == [record["id"] for record in read_jsonl(Path(small["pool"]))]
    weights = table["weight"].to_numpy()
    assert weights.min() >= 0
    assert abs(weights.mean() - 1) < 1e-9
    assert weights.std() > 0.01
    assert set(table["visits"].to_pylist()) == {2}


def test_the_event_file_has_every_promised_tag(finished):
    events = EventAccumulator(str(finished))
    files = sorted(finished.glob("events.*"))
    tags: dict[str, set[str]] = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for kind, names in events.Tags().items():
            if isinstance(names, list):
                tags.setdefault(kind, set()).update(names)
    assert {*STEP_TAGS, "monitor/loss", "weights/max", "weights/min", "test/loss"} <= tags["scalars"]
    assert "weights/distribution" in tags["histograms"]
    assert {"weights/lowest/text_summary", "weights/highest/text_summary"} <= tags["tensors"]
    first = EventAccumulator(str(files[0])).Reload()
    assert len(first.Scalars("lower/loss")) == 24


def test_metrics_are_those_of_the_test_set(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"test/loss", "test/loss_per_token", "auroc/all"} <= metrics.keys()
    assert 0 < metrics["test/loss"] < 5


def test_the_exported_policy_is_the_monitor_best(finished, small):
    model = AutoModelForCausalLM.from_pretrained(finished / "policy")
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    losses = []
    for record in read_jsonl(Path(small["test"])):
        prompt = tokenizer(record["prompt"] + "\n").input_ids
        ids = torch.tensor([[*prompt, *tokenizer(record["response"]).input_ids, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    expected = json.loads((finished / "metrics.json").read_text())["test/loss"]
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-5)


def test_the_written_config_runs_again_and_test_agrees(finished, capsys):
    best = finished / "checkpoints" / "best.ckpt"
    expected = json.loads((finished / "metrics.json").read_text())["test/loss"]
    curves = read_curves(finished)
    for command in ("test", "validate"):
        assert main([command, f"--config={finished / 'config.yaml'}", f"--ckpt_path={best}"]) == 0
    assert json.loads((finished / "metrics.json").read_text())["test/loss"] == pytest.approx(expected, abs=1e-7)
    assert read_curves(finished) == curves  # those of the fit stay as they are


def test_the_config_is_in_the_run_folder_whatever_the_logger_and_begins_a_new_run(flags, tmp_path):
    board = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'elsewhere'}"]
    assert main(["fit", *flags, *board, "--trainer.max_steps=1"]) == 0
    assert main(["fit", *flags, *board, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["ckpt_path"] is None
    assert not list((tmp_path / "elsewhere").rglob("config.yaml"))
    assert not (tmp_path / "run" / "checkpoints" / "earlier-last.ckpt").exists()  # the second call continued the first


def test_a_new_run_in_the_folder_of_an_earlier_one_leaves_nothing_of_it(flags, tmp_path):
    assert main(["fit", *flags, "--trainer.max_steps=2", "--trainer.max_epochs=-1"]) == 0
    (tmp_path / "run" / "predictions.jsonl").touch()
    earlier = set((tmp_path / "run").glob("events.*"))
    assert main(["fit", *flags, "--trainer.max_steps=1", "--trainer.max_epochs=-1"]) == 0  # by the same process
    assert not earlier & set((tmp_path / "run").glob("events.*"))
    assert len(read_curves(tmp_path / "run")["lower/loss"]) == 1
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: `id` is missing"),
        ('{"id": "x"}', "line 2: neither `corrupted` nor `harmful`"),
        ('{"id": "x", "corrupted": "false"}', "line 2: 'false' says neither"),
        ("", "lacks 1 rows of the pool"),
    ],
)
def test_a_bad_truth_file_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "truth.jsonl"
    path.write_text(f'{{"id": 1, "harmful": 0}}\n{line}\n{{"id": 2, "corrupted": true, "kind": "k"}}\n')
    with pytest.raises(UserError, match=message):
        read_truth(str(path), ["1", "2", "3"])


def test_a_bad_truth_file_is_told_before_the_first_step(flags, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "truth.jsonl", [{"id": "other", "corrupted": 1}])
    monkeypatch.setattr(LitBilevel, "training_step", lambda *_: pytest.fail("a step was taken"))
    assert main(["fit", *flags, f"--data.truth={path}"]) == 2
    assert "lacks 90 rows of the pool" in capsys.readouterr().err
