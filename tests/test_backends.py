"""Fits through libraries that are extras, each against the plain run: the same numbers, resume, export.

Run by `scripts/backends.sh`, which makes an environment for each; a test is skipped, and says so, where its library is
absent. What these tests cannot reach on a CPU (kernels of CUDA, NCCL) is left to the tier `gpu`.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from support import ranks
from support.files import TOY, read_jsonl, write_jsonl
from support.mortal import Moment, Run, same
from support.refining import REFINE
from transformers import AutoModelForCausalLM

from lit_bilevel import LoraSettings, PolicySettings
from lit_bilevel.callbacks.export import read_saved_state
from lit_bilevel.cli import main
from lit_bilevel.policy.load import load_policy

pytestmark = [pytest.mark.backends, pytest.mark.filterwarnings("ignore")]  # what libraries say of each other
HOUR = 3600.0
LORA = "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"


def weights(folder: Path) -> torch.Tensor:
    return torch.tensor(pyarrow.parquet.read_table(folder / "weights.parquet")["weight"].to_numpy())


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def killed_and_continued(flags: list[str], folder: Path, processes: int = 1) -> Path:
    """Run folder of a run that is sent SIGTERM after its fifth step and goes on from there."""
    own = [*flags, f"--trainer.default_root_dir={folder / 'parts'}"]
    run = Run(own, folder / "log", processes, Moment("step", 6, rank=0, number=signal.SIGTERM))
    assert run.wait() == [128 + signal.SIGTERM] * processes, run.text()
    run = Run(own, folder / "log", processes)
    assert run.wait() == [0] * processes, run.text()
    return folder / "parts"


def finished(flags: list[str], folder: Path, processes: int = 1) -> Path:
    run = Run([*flags, f"--trainer.default_root_dir={folder}"], folder.with_suffix(".log"), processes)
    assert run.wait() == [0] * processes, run.text()
    return folder


# ---- DeepSpeed ----

ZERO = {
    "penalty": {"solver": "Penalty"},
    "bmo": {"solver": "Mixing", "weights": "BMOWeights"},
    "adapter": {"solver": "Penalty", "lora": {"r": 2, "target_modules": ["query_key_value"]}},
}


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> tuple[dict, dict]:
    """What each case ends with in one process without DeepSpeed, and in one or two with it."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    ranks.save_model(folder / "model")
    for name, size in {"pool": 60, "validation": 30}.items():
        write_jsonl(folder / f"{name}.jsonl", read_jsonl(TOY / f"{name}.jsonl")[:size])
    files = {name: str(folder / f"{name}.jsonl") for name in ("pool", "validation")}
    common = {"model": str(folder / "model"), "folder": str(folder / "run"), "rows": 8, "steps": 12, "clip": None}
    common |= {"precision": "32-true", "eps": 1e-4, **files}
    plain = [{**common, **settings, "name": name, "strategy": "auto"} for name, settings in ZERO.items()]
    sharded = [{**case, "strategy": s, "name": f"{case['name']} {s}"} for case in plain for s in ("zero1", "zero2")]
    sharded.append({**plain[0], "strategy": "zero2", "name": "bf16", "precision": "bf16-mixed"})
    two = ranks.runs(sharded, folder / "two", 2, HOUR)
    one = ranks.runs([case for case in sharded if case["name"] == "penalty zero2"], folder / "one", 1, HOUR)
    return ranks.runs(plain, folder / "plain", 1, HOUR), two | {"penalty zero2 alone": one["penalty zero2"]}


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_equals_the_plain_run(zero, name, stage):
    plain, sharded = zero
    for other in [f"{name} {stage}"] + ["penalty zero2 alone"] * (name == "penalty"):
        assert (plain[name]["weights"] - sharded[other]["weights"]).abs().max() < 1e-4
        assert (plain[name]["policy"] - sharded[other]["policy"]).abs().max() < 1e-5
    assert plain[name]["weights"].std() > 0.05


def test_deepspeed_leaves_the_weights_in_float32(zero):
    plain, sharded = zero
    assert sharded["bf16"]["dtypes"] == plain["penalty"]["dtypes"]
    assert "torch.bfloat16" not in sharded["bf16"]["dtypes"]
    relative = (plain["penalty"]["weights"] - sharded["bf16"]["weights"]).std() / plain["penalty"]["weights"].std()
    assert relative < 0.3


@pytest.mark.parametrize(("stage", "adapter"), [(1, False), (2, False), (2, True)], ids=["1", "2", "2-adapter"])
def test_deepspeed_resumes_and_exports(flags, tmp_path, stage, adapter):
    pytest.importorskip("deepspeed")
    flags = [*flags, "--model.solver=Penalty", "--model.gradient_clip_val=null", "--data.batch_size=4"]
    flags += [
        "--trainer.strategy=support.deepspeed_cpu.DeepSpeedOnCPU",
        f"--trainer.strategy.stage={stage}",
        "--trainer.devices=2",
    ]
    flags += ["--trainer.strategy.exclude_frozen_parameters=true", "--figures.enabled=false"]
    flags += [f"--model.policy.lora={LORA}"] if adapter else []
    whole = finished(flags, tmp_path / "whole", 2)
    same(whole, killed_and_continued(flags, tmp_path, 2))
    saved = read_saved_state(whole / "checkpoints" / "best.ckpt")
    if adapter:
        # DeepSpeed leaves out each frozen parameter once, and a head that is tied to the embedding has two names
        assert {name for name in saved if "lora_" not in name} <= {"base_model.model.lm_head.weight"}
        assert any("lora_" in name for name in saved)
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(TOY / "model")
        loaded = PeftModel.from_pretrained(base, whole / "policy").state_dict()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(whole / "policy").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


# ---- bitsandbytes ----


@pytest.mark.parametrize("solver", ["Mixing", "ValueFunction"])
def test_a_quantized_base_equals_a_plain_one(flags, tmp_path, caplog, solver):
    pytest.importorskip("bitsandbytes")
    weighting = "BMOWeights" if solver == "Mixing" else "SoftmaxWeights"
    common = [*flags, f"--model.policy.lora={LORA}", f"--model.solver={solver}", f"--model.weights={weighting}"]
    common += ["--figures.enabled=false", "--trainer.max_epochs=4"]
    found = {}
    for name in ("null", "8bit", "4bit"):
        folder = tmp_path / name
        own = [*common, f"--model.policy.quantization={name}", f"--trainer.default_root_dir={folder}"]
        assert main(["fit", *own]) == 0
        counted = re.findall(r": ([\d,]+ of [\d,]+ parameters are trained)", caplog.text)
        found[name] = metrics(folder)["test/loss"], weights(folder).log(), counted[-1]
    for name, alike in {"8bit": 0.99, "4bit": 0.9}.items():
        assert found[name][2] == found["null"][2]  # numbers of the base are counted, not the bytes they are packed in
        assert abs(found[name][0] - found["null"][0]) < 0.05
        assert torch.corrcoef(torch.stack([found[name][1], found["null"][1]]))[0, 1] > alike


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_resumes_and_exports(flags, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    flags = [*flags, f"--model.policy.lora={LORA}", "--model.solver=Mixing", "--model.weights=BMOWeights"]
    flags += [f"--model.policy.quantization={quantization}", "--figures.enabled=false"]
    whole = finished(flags, tmp_path / "whole")
    same(whole, killed_and_continued(flags, tmp_path))
    saved = read_saved_state(whole / "checkpoints" / "best.ckpt")
    assert all("lora_" in name for name in saved)
    exported = load_file(whole / "policy" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in saved} == set(exported)
    assert all(torch.equal(value, exported[name.replace(".default", "")]) for name, value in saved.items())
    loss = metrics(whole)["test/loss"]
    best = f"--ckpt_path={whole / 'checkpoints' / 'best.ckpt'}"
    assert main(["test", *flags, f"--trainer.default_root_dir={whole}", best]) == 0
    assert metrics(whole)["test/loss"] == loss
    # the folder, put on the base, is that policy
    again = [flag for flag in flags if "lora" not in flag] + [f"--model.policy.path={whole / 'policy'}"]
    assert main(["test", *again, f"--trainer.default_root_dir={tmp_path / 'again'}"]) == 0
    assert abs(metrics(tmp_path / "again")["test/loss"] - loss) < 1e-5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_four_bit_layers_multiply_in_the_precision_of_the_run_and_are_not_packed_anew(monkeypatch, precision):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    settings = PolicySettings(str(TOY / "model"), lora=LoraSettings(4, target_modules=["q_proj"]), quantization="4bit")
    policy = load_policy(settings, torch.float32, precision)
    layers = [layer for layer in policy.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert {layer.compute_dtype for layer in layers} == {torch.float32 if "32" in precision else torch.bfloat16}


# ---- vLLM and continuous batching: refined runs with the same answers as the plain backend ----


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model whose heads have a width that vLLM's kernels take."""
    return ranks.save_wide_model(tmp_path_factory.mktemp("base"))


def refined(small, folder: Path, base: Path, backend: list[str]) -> list[str]:
    """Flags of a run with greedy refinement; every engine is asked for the same."""
    return [
        *REFINE,
        *(f"--data.{name}={path}" for name, path in small.items()),
        f"--model.policy.path={base}",
        f"--model.policy.lora={LORA}",
        "--data.batch_size=8",
        "--trainer.max_epochs=3",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks.sampling.temperature=0",
        "--trainer.callbacks.responses=1",
        "--figures.enabled=false",
        f"--trainer.default_root_dir={folder}",
        *backend,
    ]


def answers(folder: Path) -> dict[tuple, list[int]]:
    records = read_jsonl(folder / "responses.jsonl")
    return {(r["round"], r["id"], r["sample"]): r["token_ids"] for r in records}


@pytest.mark.parametrize("engine", ["ContinuousBatching", "VLLM"])
def test_a_refined_run_has_the_same_greedy_answers(small, tmp_path, base, engine):
    backend = [f"--trainer.callbacks.backend={engine}"]
    if engine == "VLLM":
        pytest.importorskip("vllm")
        backend += ["--trainer.callbacks.backend.max_model_len=128"]
        backend += ["--trainer.callbacks.backend.options={dtype: float32, enforce_eager: true, max_num_seqs: 64}"]
    else:
        backend += ["--trainer.callbacks.backend.options={num_blocks: 64, max_batch_tokens: 256}"]
    assert main(["fit", *refined(small, tmp_path / "plain", base, [])]) == 0
    assert main(["fit", *refined(small, tmp_path / "other", base, backend)]) == 0
    plain, other = answers(tmp_path / "plain"), answers(tmp_path / "other")
    assert len({key[0] for key in plain}) > 1  # the second round asks an adapter that was handed over anew
    assert plain == other
    assert (weights(tmp_path / "plain") - weights(tmp_path / "other")).abs().max() < 1e-3
