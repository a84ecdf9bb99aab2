"""Every configuration in the repository parses, builds its parts and runs."""

from __future__ import annotations

import pyarrow.parquet
import pytest
from conftest import ROOT, TOY

from lit_bilevel.cli import BilevelCLI, main

COMPLETE = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
PARTIAL = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_configurations_build(name, tmp_path):
    cli = BilevelCLI(
        [f"--config=configs/{name}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"],
        run=False,
    )
    assert cli.model.solver


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_configurations_parse_on_top_of_a_complete_one(name):
    with pytest.raises(SystemExit) as end:
        BilevelCLI(["--config=configs/quickstart.yaml", f"--config={name}", "--print_config"], run=False)
    assert end.value.code == 0


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_complete_configurations_run_two_steps_on_the_toy_policy(name, flags, tmp_path):
    """With the hub's models and data replaced by local ones, and what needs a GPU left out."""
    assert flags[0].startswith("--config=")
    local = [f"--model.policy.path={TOY / 'model'}", "--data.columns=null", "--data.test=null", "--data.max_length=64"]
    cheap = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.accelerator=cpu", "--export.policy=false"]
    text = (ROOT / "configs" / name).read_text()
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


NUMBERS = (
    -(10**9),
    -1,
    0,
    1,
    2,
    3,
    7,
    10**9,
    -0.5,
    0.0,
    1e-9,
    0.3,
    1.0,
    1.5,
    1e30,
    "nan",
    "inf",
    "-inf",
    "null",
    "true",
)
WORDS = (
    "",
    " ",
    "null",
    "auto",
    "error",
    "skip",
    "left",
    "all",
    "text",
    "nonsense",
    "../..",
    "[]",
    "{}",
    "[1]",
    "'{a: b}'",
)
FUZZED = {  # options, with values that are among others right for them; no number of processes, which would start them
    "data": {
        "batch_size max_length upper_batch_size eval_batch_size monitor_fraction seed": NUMBERS,
        "truncation train_on format on_bad_row columns tokenizer truth test": WORDS,
    },
    "model": {
        "upper_weight upper_weight_decay upper_weight_start weight_start warmup_steps gradient_clip_val": NUMBERS,
        "accumulate_grad_batches max_new_tokens guard.max_skipped_steps guard.max_ratio guard.on_limit": NUMBERS,
        "guard.min_effective_size optimizer.init_args.lr weight_optimizer.init_args.lr": NUMBERS,
        "weights.init_args.floor weights.init_args.cap weights.init_args.keep solver.init_args.epsilon": NUMBERS,
        "lr_scheduler": (*WORDS, "cosine", "linear", "polynomial", "cosine_with_min_lr", "reduce_lr_on_plateau"),
        "lr_scheduler_kwargs policy.dtype policy.lora policy.attn_implementation response_weights": WORDS,
        "weights": (*WORDS, "SigmoidWeights", "BMOWeights", "SourceWeights", "NetworkWeights", "UniformWeights"),
        "solver": (*WORDS, "Penalty", "Mixing", "ValueFunction", "OneStep", "HFGenerate"),
    },
    "checkpoint": {"every_n_steps every_minutes": NUMBERS},
    "trainer": {
        "max_epochs max_steps limit_train_batches val_check_interval gradient_clip_val log_every_n_steps": NUMBERS,
        "precision accelerator": (*WORDS, "64-true", "bf16-mixed", "cpu", "16"),
    },
}
OPTIONS = {
    f"{group}.{name}": values
    for group, names in FUZZED.items()
    for some, values in names.items()
    for name in some.split()
}


@pytest.mark.parametrize("examples", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_any_setting_is_taken_as_it_is_or_refused_in_one_message(tmp_path, monkeypatch, examples):
    """One step of every configuration: no traceback, and no setting that is something else in the run."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sizes = {"pool": 24, "validation": 10, "test": 4}
    paths = {
        n: write_jsonl(tmp_path / f"{n}.jsonl", read_jsonl(TOY / f"{n}.jsonl")[:size]) for n, size in sizes.items()
    }
    common = [
        "fit",
        "--config=configs/quickstart.yaml",
        *(f"--data.{name}={path}" for name, path in paths.items()),
        "--data.truth=null",
        "--data.batch_size=4",
        "--trainer.fast_dev_run=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    made: list[BilevelCLI] = []
    original = BilevelCLI.instantiate_classes

    def remember(cli: BilevelCLI) -> None:
        original(cli)
        made.append(cli)

    monkeypatch.setattr(BilevelCLI, "instantiate_classes", remember)
    option = st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(OPTIONS[name]))
    )

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(option, min_size=1, max_size=2))
    def check(chosen):
        given = [f"--{name}={value}" for name, value in chosen]
        made.clear()
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            status = main([*common, *given])
        if status:
            assert status == 2, given
            assert said.getvalue().splitlines()[-1].strip(), given
            assert "lit-bilevel: " in said.getvalue(), given
            assert "Traceback" not in said.getvalue(), given
            return
        for name, value in dict(chosen).items():
            assert same_value(made[0].config["fit"][name], value), (given, made[0].config["fit"][name])

    check()


def same_value(found: object, given: object) -> bool:
    """Whether a setting is what was written on the command line."""
    if found is None:
        return given in ("null", "")
    if isinstance(found, bool | int | float) and not isinstance(given, str):
        return found == given
    return (
        str(given) in str(found)
        or str(given).lower() == str(found).lower()
        or str(given).strip("'\" ") in ("", "{a: b}")
    )
