"""What `select` writes trains in plain TRL, and both its rows and the policy that TRL saves start a later run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import load_dataset
from support.files import TOY, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM

from lit_bilevel.__main__ import main

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture
def selected(small, flags, tmp_path) -> Path:
    """The better half of a pool in TRL's format, after a short run."""
    pool = [
        {"id": r["id"], "prompt": r["prompt"], "completion": r["response"]} for r in read_jsonl(Path(small["pool"]))
    ]
    path = write_jsonl(tmp_path / "pool.jsonl", pool)
    assert main(["fit", *flags, f"--data.pool={path}", "--figures.enabled=false"]) == 0
    output = tmp_path / "selected.jsonl"
    weights = str(tmp_path / "run" / "weights.parquet")
    arguments = ["--weights", weights, "--pool", path, "--output", str(output), "--keep", "0.5", "--with_weights"]
    assert main(["select", *arguments]) == 0
    return output


def fit_again(flags: list[str], pool: Path, policy: Path, run: Path, earlier: Path) -> dict[str, np.ndarray]:
    """One step on the selected rows, with the weights they had; returns the columns of the new weights."""
    arguments = ["fit", *flags, f"--data.pool={pool}", f"--model.policy.path={policy}", "--data.truth=null"]
    arguments += [f"--trainer.default_root_dir={run}", "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    arguments += ["--trainer.callbacks=WarmStart", f"--trainer.callbacks.weights={earlier}", "--figures.enabled=false"]
    assert main(arguments) == 0
    table = pyarrow.parquet.read_table(run / "weights.parquet")
    return {name: table[name].to_numpy() for name in ("weight", "visits")}


def test_the_kept_rows_start_a_later_run_with_their_weights(selected, flags, tmp_path):
    earlier = tmp_path / "run" / "weights.parquet"
    found = fit_again(flags, selected, TOY / "model", tmp_path / "again", earlier)
    before = np.array([record["weight"] for record in read_jsonl(selected)])
    unseen = found["visits"] == 0
    assert 0 < (~unseen).sum() <= 8  # the rows of one step
    ratio = found["weight"][unseen] / before[unseen]
    assert ratio.std() < 1e-5 * ratio.mean()


@needs_trl
@pytest.mark.filterwarnings("default")
def test_the_kept_rows_train_in_trl_and_come_back(selected, flags, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(selected), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 45
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(str(TOY / "model"), args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    trainer.save_model()
    start, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (TOY / "model", tmp_path / "trl"))
    assert not torch.equal(start.get_input_embeddings().weight, tuned.get_input_embeddings().weight)
    fit_again(flags, selected, tmp_path / "trl", tmp_path / "again", tmp_path / "run" / "weights.parquet")
