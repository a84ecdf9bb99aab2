"""Any settings: a fuzzer sets options to values that may mean nothing."""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
from support.files import TOY, read_jsonl, write_jsonl

from lit_bilevel.cli import BilevelCLI, main

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
        "upper_weight upper_weight_decay upper_weight_decay_every warmup_steps gradient_clip_val": NUMBERS,
        "upper_weight_decay_every accumulate_grad_batches max_new_tokens": NUMBERS,
        "guard.max_skipped_steps guard.max_ratio guard.on_limit": NUMBERS,
        "guard.min_effective_size optimizer.init_args.lr weight_optimizer.init_args.lr": NUMBERS,
        "weights.init_args.floor weights.init_args.cap weights.init_args.keep solver.init_args.epsilon": NUMBERS,
        "lr_scheduler": (*WORDS, "cosine", "linear", "polynomial", "cosine_with_min_lr", "reduce_lr_on_plateau"),
        "lr_scheduler_kwargs policy.dtype policy.lora policy.attn_implementation response_weights phases": WORDS,
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
        name: write_jsonl(tmp_path / f"{name}.jsonl", read_jsonl(TOY / f"{name}.jsonl")[:size])
        for name, size in sizes.items()
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
            found = made[0].config["fit"][name]
            assert is_same(found, value), (given, found)

    check()


def is_same(found: object, given: str) -> bool:
    """Whether a setting is what was written on the command line; an object is named by its class, and may be empty."""
    if isinstance(found, bool) or found is None:
        return given in (str(found).lower(), "null")
    if isinstance(found, int | float):
        return float(found) == float(given)
    return given in str(found) or given.strip() in ("", "{}", "[]", '{"a": "b"}')
