"""Every configuration in the repository parses, builds its parts and runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
import yaml
from support.files import ROOT, TOY, read_jsonl, write_jsonl

from lit_bilevel.cli import BilevelCLI, main
from lit_bilevel.training import strategies
from lit_bilevel.training.callbacks import refiners
from lit_bilevel.training.optimizers import make_optimizers
from lit_bilevel.training.refusals import check_run

COMPLETE = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
PARTIAL = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/*.yaml"))


METHODS = {
    "contrast.yaml": "ValueFunction SigmoidWeights SFT",
    "curate.yaml": "CrossFit SigmoidWeights SFT",
    "dpo_upper.yaml": "OneStep SoftmaxWeights DPO",
    "paper.yaml": "OneStep SoftmaxWeights SFT",
    "paper_llama3.yaml": "OneStep SoftmaxWeights SFT",
    "paper_online.yaml": "OneStep SoftmaxWeights SFT TokenRatio SelfRefine",
    "proxy_to_large.yaml": "OneStep SigmoidWeights SFT",
    "quality.yaml": "OneStep SigmoidWeights SFT",
    "quickstart.yaml": "OneStep SoftmaxWeights SFT",
    "refine.yaml": "OneStep SoftmaxWeights SFT SelfNormalised SelfRefine",
    "safety.yaml": "OneStep SigmoidWeights SFT",
    "seal.yaml": "Penalty SoftmaxWeights SFT",
}
"""Solver, weights and upper objective of each, and what it refines with."""


def transcripts(folder: Path) -> str:
    """The toy's validation rows as preference pairs in the shape of hh-rlhf."""
    pairs = [
        {name: f"\n\nHuman: {row['prompt']}\n\nAssistant: {answer}" for name, answer in answers.items()}
        for row in read_jsonl(TOY / "validation.jsonl")[:30]
        for answers in [{"chosen": row["response"], "rejected": f"no {row['response']}"}]
    ]
    return write_jsonl(folder / "pairs.jsonl", pairs)


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_configurations_build(name, tmp_path):
    """It is the method that it says, goes with its own Trainer, and its optimizers and schedule can be made."""
    cli = BilevelCLI(
        [f"--config=configs/{name}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"],
        run=False,
    )
    model = cli.model
    model._trainer = cli.trainer
    check_run(model, "fit")
    refined = [type(callback).__name__ for callback in refiners(cli.trainer)]
    parts = (model.solver, model.weights, model.upper_objective, *([model.refinement.rule] if refined else []))
    assert [type(part).__name__ for part in parts] + refined == METHODS[name].split()
    model.weights.build(torch.tensor([0, 1, 0, 1]))
    model.policy = SimpleNamespace(trainable=lambda: [torch.nn.Parameter(torch.ones(2))])
    model._trainer = SimpleNamespace(estimated_stepping_batches=100, strategy=cli.trainer.strategy)
    optimizers, (schedule,) = make_optimizers(model)
    first = schedule["scheduler"].get_last_lr()[0]
    rates = [first, *(_next_rate(optimizers[0], schedule["scheduler"]) for _ in range(99))]
    assert max(rates) == optimizers[0].defaults["lr"] > 0
    assert min(rates) < max(rates) or model.lr_scheduler == "constant"


def _next_rate(optimizer, schedule) -> float:
    optimizer.step()
    schedule.step()
    return schedule.get_last_lr()[0]


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_configurations_parse_on_top_of_a_complete_one(name):
    with pytest.raises(SystemExit) as end:
        BilevelCLI(["--config=configs/quickstart.yaml", f"--config={name}", "--print_config"], run=False)
    assert end.value.code == 0


@pytest.mark.parametrize("name", PARTIAL)
def test_the_command_of_a_partial_configuration_is_not_refused(name, tmp_path):
    """Checked are its settings; libraries and devices that it needs are not there."""
    (base,) = re.findall(rf"--config (\S+) (?:\\\n# +)?--config {name}", (ROOT / name).read_text())
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false"]
    place = f"--trainer.default_root_dir={tmp_path}"
    model = BilevelCLI(
        [f"--config={base}", f"--config={name}", *here, "--trainer.precision=32-true", place], run=False
    ).model
    assert strategies.of_kernels(model) == []
    if "deepspeed" in name:
        stage = yaml.safe_load((ROOT / name).read_text())["trainer"]["strategy"]["init_args"]["stage"]
        config = {"zero_optimization": {"stage": stage}}
        model._trainer = SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=stage == 3, config=config))
        assert strategies._of_deepspeed(model, model._trainer.strategy) == []


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_complete_configurations_run_two_steps_on_the_toy_policy(name, flags, tmp_path):
    """With the hub's models and data replaced by local ones, and what needs a GPU left out."""
    assert flags[0].startswith("--config=")
    local = [f"--model.policy.path={TOY / 'model'}", "--data.columns=null", "--data.test=null", "--data.max_length=64"]
    cheap = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.accelerator=cpu", "--export.policy=false"]
    text = (ROOT / "configs" / name).read_text()
    if "class_path: DPO" in text:
        local.append(f"--data.validation={transcripts(tmp_path)}")
    if "query_key_value" in text:
        local.append("--model.policy.lora.target_modules=[q_proj, v_proj]")
    if "bf16" in text:
        cheap.append("--trainer.precision=32-true")
    if "dtype: bfloat16" in text:
        cheap.append("--model.policy.dtype=float32")
    cheap += ["--figures.enabled=false", "--trainer.val_check_interval=2", "--data.batch_size=4"]
    assert main(["fit", f"--config=configs/{name}", *flags[1:], *local, *cheap]) == 0
    weights = pyarrow.parquet.read_table(tmp_path / "run" / "weights.parquet")
    assert len(weights) == 90
