"""The main job end to end on small toy data: the command line, the run folder, Python, resume, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from support.files import ROOT, TOY, read_jsonl, write_jsonl
from support.refining import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_bilevel.module
from lit_bilevel import (
    BilevelDataModule,
    LitBilevel,
    LoraSettings,
    OneStep,
    PolicySettings,
    SoftmaxWeights,
)
from lit_bilevel.cli import BilevelCLI, main
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.curves import read_curves
from lit_bilevel.inspection.truth import read_truth
from lit_bilevel.policy.load import load_policy

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


def fit(flags: list[str], *more: str) -> LitBilevel:
    return BilevelCLI(["fit", *flags, *more]).model


@pytest.mark.parametrize("stop", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(flags, tmp_path, stop):
    flags = [*flags, "--trainer.max_epochs=2", "--checkpoint.every_n_steps=1"]
    whole = fit(flags, f"--trainer.default_root_dir={tmp_path / 'whole'}")
    parts = f"--trainer.default_root_dir={tmp_path / 'parts'}"
    fit(flags, parts, f"--trainer.max_steps={stop}")
    resumed = fit(flags, parts, "--ckpt_path=last")
    assert resumed.global_step == whole.global_step
    whole_state, resumed_state = whole.state_dict(), resumed.state_dict()
    # both modules now hold the monitor-best checkpoint's policy; the weights are compared from the exports
    assert whole_state.keys() == resumed_state.keys()
    for name, value in whole_state.items():
        assert torch.equal(value, resumed_state[name]), name
    a, b = (pyarrow.parquet.read_table(tmp_path / name / "weights.parquet") for name in ("whole", "parts"))
    assert a.equals(b)
    last = [torch.load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_global_step_counts_policy_steps(flags):
    model = fit(flags, "--trainer.max_steps=7", "--trainer.max_epochs=-1")
    assert model.trainer.global_step == 7
    assert int(model.weights.visits.sum()) > 0


def test_ten_lines_of_python(small, tmp_path):
    seed_everything(0)
    data = BilevelDataModule(small["pool"], small["validation"], small["test"], batch_size=8)
    model = LitBilevel(PolicySettings(str(TOY / "model")), SoftmaxWeights(), OneStep())
    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, data)
    assert trainer.test(model, data)[0]["test/loss"] > 0
    assert model.weights.table().std() > 0


@pytest.mark.parametrize("flag", ["fast_dev_run=true", "limit_train_batches=3", "overfit_batches=2"])
def test_trainer_shortcuts_work(flags, tmp_path, flag):
    model = fit(flags, f"--trainer.{flag}", "--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=1")
    expected = {"fast_dev_run=true": 1, "limit_train_batches=3": 3, "overfit_batches=2": 2}[flag]
    assert model.trainer.global_step == expected
    if "fast" in flag:
        assert not (tmp_path / "run" / "weights.parquet").exists()


def test_lora_trains_the_adapter_alone_and_checkpoints_it_alone(flags, tmp_path):
    lora = "--model.policy.lora={r: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj]}"
    model = fit(flags, lora)
    names = [name for name, parameter in model.policy.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert [name for name in saved if name.startswith("policy.")] == [f"policy.{name}" for name in names]
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(TOY / "model")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "policy")
    for name, value in loaded.state_dict().items():
        if "lora" in name:
            assert torch.equal(value, saved[f"policy.model.{name}"])
    assert LoraSettings().r == 16


def test_the_exported_policy_has_what_was_not_trained(flags, tmp_path, monkeypatch):
    """A frozen parameter and a buffer of a model without an adapter: no checkpoint holds them."""

    def partly(*settings):
        policy = load_policy(*settings)
        policy.causal_lm.model.norm.requires_grad_(False)
        policy.causal_lm.register_buffer("bias", torch.arange(3.0))
        return policy

    monkeypatch.setattr(lit_bilevel.module, "load_policy", partly)
    fit(flags)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "model.norm" in name or "bias" in name]
    base, exported = (
        load_file(TOY / "model" / "model.safetensors"),
        load_file(tmp_path / "run/policy/model.safetensors"),
    )
    assert exported.keys() - base.keys() == {"bias"}
    assert torch.equal(exported["model.norm.weight"], base["model.norm.weight"])
    assert not torch.equal(exported["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_accumulation_equals_the_larger_batch(flags, tmp_path):
    double = ["--trainer.precision=64-true", "--trainer.max_epochs=1"]
    large = fit(flags, *double, "--data.batch_size=8", f"--trainer.default_root_dir={tmp_path / 'large'}")
    small = fit(
        flags,
        *double,
        "--data.batch_size=2",
        "--model.accumulate_grad_batches=4",
        f"--trainer.default_root_dir={tmp_path / 'small'}",
    )
    assert large.trainer.global_step == small.trainer.global_step
    assert large.weights.logits.dtype == torch.float64
    assert (large.weights.table() - small.weights.table()).abs().max() < 1e-9
    assert large.weights.table().std() > 0.05
    for a, b in zip(large.policy.trainable(), small.policy.trainable(), strict=True):
        assert (a - b).abs().max() < 1e-9


def test_bf16_keeps_the_weights_in_float32(flags):
    model = fit(flags, "--trainer.precision=bf16-true", "--trainer.max_steps=2")
    assert model.weights.logits.dtype == torch.float32
    assert model.weights.sums.dtype == torch.float64
    assert next(model.policy.parameters()).dtype == torch.bfloat16
    assert model.weights.table().std() > 0


# ---- refusals: one message, no traceback, nothing left that looks finished ----


def refusal(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_wrong_paths_are_refused(flags, capsys, tmp_path):
    assert "nowhere.jsonl does not exist" in refusal(["fit", *flags, "--data.pool=nowhere.jsonl"], capsys)
    assert "no tokenizer could be loaded from 'nowhere'" in refusal(
        ["fit", *flags, "--model.policy.path=nowhere"], capsys
    )
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / "weights.parquet").exists()


def test_bad_data_is_refused(flags, small, capsys, tmp_path):
    records = read_jsonl(Path(small["pool"]))
    records[4]["response"] = ""
    bad = write_jsonl(tmp_path / "bad.jsonl", records)
    message = refusal(["fit", *flags, f"--data.pool={bad}"], capsys)
    assert re.search(r"bad\.jsonl.*line 5.*`response` is empty", message)


def test_lambda_that_falls_by_steps_is_the_same_whatever_an_epoch_is(small, tmp_path):
    class Lambda(Callback):
        def on_train_batch_start(self, trainer, pl_module, *rest):
            seen.append(pl_module.current_upper_weight)

    found = []
    for size, every in ((30, 4), (10, 4), (30, None)):
        seen: list[float] = []
        falling = {"upper_weight": 0.5, "upper_weight_decay": 0.2, "upper_weight_decay_every": every}
        run(small, tmp_path, Lambda(), size=size, steps=13, **falling)
        found.append(seen)
    by_steps = [max(0.0, 0.5 - 0.2 * (step // 4)) for step in range(13)]
    assert found[:2] == [by_steps, by_steps]
    assert found[2] == [max(0.0, 0.5 - 0.2 * (step // 3)) for step in range(13)]  # three steps an epoch


def test_settings_without_meaning_are_refused(flags, capsys):
    assert "`model.upper_weight` is 0.0, so λ is 0 in some step, where `Penalty` has no meaning" in refusal(
        ["fit", *flags, "--model.solver=Penalty", "--model.upper_weight=0"], capsys
    )
    falling = ["fit", *flags, "--model.solver=Penalty", "--model.upper_weight_decay=0.25"]
    assert "so λ is 0 in epoch 3, where `Penalty`" in refusal([*falling, "--trainer.max_epochs=3"], capsys)
    open_end = [*falling, "--trainer.max_epochs=-1", "--trainer.max_steps=2"]
    assert "so λ is 0 after some epochs, where `Penalty`" in refusal(open_end, capsys)
    assert main([*falling, "--trainer.max_epochs=2", "--trainer.max_steps=2"]) == 0  # λ stays above 0
    assert "the pool has 90 rows and a policy step takes 128" in refusal(
        ["fit", *flags, "--data.batch_size=128"], capsys
    )
    assert "has one row" in refusal(["fit", *flags, "--data.batch_size=1", "--trainer.max_steps=1"], capsys)


def test_stale_results_do_not_survive_a_failed_run(flags, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")
    refusal(["fit", *flags, "--data.batch_size=1", "--trainer.max_steps=1"], capsys)
    assert not (run / "metrics.json").exists()


# ---- quick answers ----


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_the_top_level_answers_in_about_a_second(argument):
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "lit_bilevel", argument], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert time.perf_counter() - started < 2
    assert "lit-bilevel" in result.stdout
