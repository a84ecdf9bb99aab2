"""The core of the tests on a GPU, each fit against the same one on a CPU in float32.

    pytest -m gpu tests/test_gpu.py               `--accelerator cpu` tries the tests themselves where there is none

Left out: several GPUs, and times; `scripts/gpu.sh` runs this file and then the benchmarks.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from support import ranks
from support.files import TOY, read_jsonl
from support.generating import ENDS, ask, make
from support.refining import REFINE

from lit_bilevel.cli import main
from lit_bilevel.generation.backends import ContinuousBatching
from lit_bilevel.generation.base import Sampling
from lit_bilevel.generation.hf import HFGenerate

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
SOLVERS = {
    "OneStep": ["--model.weights=SoftmaxWeights"],
    "Penalty": ["--model.weights=SoftmaxWeights"],
    "ValueFunction": ["--model.weights=SigmoidWeights"],
    "Implicit": ["--model.weights=SoftmaxWeights"],
    "Mixing": ["--model.weights=BMOWeights"],
}
PRECISIONS = {  # how far the log-weights may be from those on the CPU, as a share of their spread
    "32-true": 0.02,
    "tf32": 0.2,
    "bf16-mixed": 0.5,
    "16-mixed": float("inf"),  # its first steps may be skipped, and then scores are of another policy
}


@pytest.fixture(scope="session")
def accelerator(request) -> str:
    asked = request.config.getoption("--accelerator")
    if asked == "gpu" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; `--accelerator cpu` tries the tests without one")
    return asked


@pytest.fixture
def _digits():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Fitted:
    """What a fit left.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        table = pyarrow.parquet.read_table(folder / "weights.parquet")
        self.logs = torch.tensor(table["weight"].to_numpy()).log()
        self.loss = json.loads((folder / "metrics.json").read_text())["test/loss"]

    def differs(self, other: Fitted) -> float:
        """By how much the logarithms of the weights do, as a share of their spread."""
        return float((self.logs - other.logs).std() / other.logs.std())


@pytest.fixture(scope="session")
def fit(small, tmp_path_factory):
    """Two epochs on the small data with such flags; the same flags are run once."""
    done: dict[tuple[str, ...], Fitted] = {}

    def run(accelerator: str, *more: str, folder: Path | None = None) -> Fitted:
        key = (accelerator, *more)
        if folder is not None or key not in done:
            place = folder or tmp_path_factory.mktemp("fit")
            flags = ["--config=configs/quickstart.yaml", *(f"--data.{name}={path}" for name, path in small.items())]
            flags += ["--data.batch_size=8", "--trainer.max_epochs=2", "--trainer.val_check_interval=6"]
            flags += [f"--trainer.accelerator={accelerator}", "--figures.enabled=false"]
            flags += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={place}"]
            assert main(["fit", *flags, *more]) == 0
            if folder is not None:
                return Fitted(place)
            done[key] = Fitted(place)
        return done[key]

    return run


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("_digits")
def test_a_solver_learns_the_same_weights(fit, accelerator, solver, precision):
    if precision == "16-mixed" and accelerator == "cpu":
        pytest.skip("CPUs have no loss scaling in the Trainer; tests/test_loss_scaling.py gives it one")
    if solver == "Implicit" and precision not in ("32-true", "tf32"):
        pytest.skip("second derivatives of rounded losses are not compared")
    flags = [f"--model.solver={solver}", *SOLVERS[solver]]
    expected = fit("cpu", *flags)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    found = fit(accelerator, *flags, f"--trainer.precision={'32-true' if precision == 'tf32' else precision}")
    assert found.differs(expected) < PRECISIONS[precision]
    assert found.logs.isfinite().all()
    assert found.logs.std() > 0.3 * expected.logs.std()
    assert abs(found.loss - expected.loss) < (0.02 if precision == "32-true" else 0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_one_step_in_forward_mode(fit, accelerator, precision):
    flags = ["--model.solver=OneStep", "--model.solver.derivative=forward"]
    found, expected = fit(accelerator, *flags, f"--trainer.precision={precision}"), fit("cpu", *flags)
    assert found.differs(expected) < (0.02 if precision == "32-true" else 0.7)


@pytest.mark.parametrize(
    "more",
    [
        ("--trainer.strategy=ddp",),
        ("--config=configs/strategies/fsdp2.yaml", "--trainer.devices=1"),
        ("--data.packing=true",),
        ("--model.policy.activation_checkpointing=true",),
        ("--model.policy.compile=true",),
    ],
    ids=["ddp", "fsdp2", "packing", "checkpointing", "compile"],
)
def test_a_way_to_run_changes_nothing(fit, accelerator, more):
    if accelerator == "cpu" and "compile" in more[0]:
        pytest.skip("tests/test_compile.py compiles on CPUs")
    assert fit(accelerator, *more).differs(fit(accelerator)) < 0.02


@pytest.mark.parametrize("packing", [False, True])
def test_flash_attention(fit, accelerator, packing, tmp_path):
    if accelerator == "cpu":
        pytest.skip("flash attention has no kernels for CPUs")
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    flags = ["--model.solver=Penalty", "--trainer.precision=bf16-true", f"--data.packing={packing}"]
    flags.append(f"--model.policy.path={ranks.save_wide_model(tmp_path)}")
    found = fit(accelerator, *flags, "--model.policy.attn_implementation=flash_attention_2")
    assert found.differs(fit(accelerator, *flags)) < 0.3


@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_run_ends_with_the_same_bits(fit, accelerator, tmp_path, stop, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = ["--trainer.deterministic=true", "--checkpoint.every_n_steps=1"]
    whole = fit(accelerator, *flags, folder=tmp_path / "whole")
    fit(accelerator, *flags, f"--trainer.max_steps={stop}", folder=tmp_path / "parts")
    parts = fit(accelerator, *flags, "--ckpt_path=last", folder=tmp_path / "parts")
    torch.use_deterministic_algorithms(False)
    assert torch.equal(whole.logs, parts.logs)
    one, other = (load_file(run.folder / "policy" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base(fit, accelerator, quantization):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    flags = ["--model.policy.lora={r: 4, target_modules: [q_proj, v_proj]}", "--model.solver=Penalty"]
    found = fit(accelerator, *flags, f"--model.policy.quantization={quantization}")
    assert abs(found.loss - fit(accelerator, *flags).loss) < 0.1


# ---- generation ----


@pytest.mark.parametrize("name", ["llama", "neox", "qwen"])
def test_greedy_answers_are_those_of_a_cpu(accelerator, name):
    policy, requests = make(name), ask()
    greedy, device = Sampling(12, temperature=0), "cuda" if accelerator == "gpu" else "cpu"
    expected = HFGenerate().generate(policy, requests, greedy, ENDS)
    policy.to(device)
    assert HFGenerate().generate(policy, requests, greedy, ENDS) == expected
    options = {} if accelerator == "gpu" else {"num_blocks": 8, "max_batch_tokens": 64}
    assert ContinuousBatching(options).generate(policy, requests, greedy, ENDS) == expected


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_samples_do_not_depend_on_batches(accelerator, name):
    policy, requests = make(name), ask()
    policy.to("cuda" if accelerator == "gpu" else "cpu")
    expected = HFGenerate().generate(policy, requests, Sampling(12, 0.7), ENDS)
    assert HFGenerate(60).generate(policy, requests[::-1], Sampling(12, 0.7), ENDS) == expected[::-1]


def test_a_refined_run(small, accelerator, tmp_path):
    flags = [*REFINE, *(f"--data.{name}={path}" for name, path in small.items()), "--data.batch_size=8"]
    flags += [f"--trainer.accelerator={accelerator}", "--trainer.max_epochs=3", "--trainer.precision=bf16-mixed"]
    flags += ["--trainer.enable_progress_bar=false", f"--model.policy.path={TOY / 'model'}", "--figures.enabled=false"]
    assert main(["fit", *flags, f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert {record["round"] for record in read_jsonl(tmp_path / "responses.jsonl")} == {1, 2}
    assert Fitted(tmp_path).logs.isfinite().all()
