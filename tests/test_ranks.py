"""The same weights and policy from one process and from two, from one batch and from several, over the same rows.

Windows have 7 or 8 rows, so two processes fill one place with padding in every other step, and so do micro-batches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import ranks
from support.files import TOY, read_jsonl, write_jsonl

METHODS = {
    "penalty": {"solver": "Penalty"},
    "value_function": {"solver": "ValueFunction"},
    "one_step": {"solver": "OneStep"},
    "one_step_differences": {"solver": "OneStep", "solver_settings": {"derivative": "one_sided"}},
    "bmo": {"solver": "Mixing", "weights": "BMOWeights", "chunk": 264 * 32},  # logits in several chunks
    "network": {"solver": "OneStep", "weights": "NetworkWeights"},
    "packed": {"solver": "OneStep", "packing": True},
    "accumulated": {"solver": "OneStep"},
    "dpo": {"solver": "OneStep", "objective": "DPO", "lora": {"r": 2, "target_modules": ["query_key_value"]}},
}
LEARN = {"name": "weights", "share": 0.5, "upper_weight": 0.9, "learning_rate": 0.5}
TRAIN = {"name": "policy", "share": 0.5, "learning_rate": 1.0, "learn_weights": False}
REST = {"name": "pool", "share": 0.5, "prepare_solver": True, "learning_rate": 0.0, "learn_weights": False}
SWEPT = {"phases": [LEARN, TRAIN], "callbacks": {"ClosingSweep": {"phase": "weights"}}}
METHODS |= {
    "phases": {"solver": "ValueFunction", **SWEPT},
    "swept_one_step": {"solver": "OneStep", **SWEPT},
    "curated": {
        "solver": "CrossFit",
        "phases": [REST, TRAIN],
        "callbacks": {"ScoredPrior": {}, "CleanProbability": {"phase": "pool"}},
        "check_every": 5,
    },
}
STRATEGIES = {
    "ddp": list(METHODS),
    "fsdp2": [name for name in METHODS if name not in ("network", "accumulated", "curated")],
}
PAIRS = [(name, strategy) for strategy, names in STRATEGIES.items() for name in names]
QUICK = [*((name, "ddp") for name in METHODS), *((name, "fsdp2") for name in ("penalty", "value_function", "one_step"))]
TOLERANCES = {"64-true": {"one_step_differences": 1e-7}, "32-true": {"one_step_differences": 1e-2}}


def case(name: str, strategy: str, folder: Path, **settings) -> dict:
    kind = "pairs_" if "objective" in METHODS[name] else ""
    common = {
        "name": f"{name} {strategy}",
        "strategy": strategy,
        "model": str(folder / "model"),
        "pool": str(folder / f"{kind}pool.jsonl"),
        "validation": str(folder / f"{kind}validation.jsonl"),
        "folder": str(folder / "run"),
        "rows": 8,
        "steps": 20,
        "precision": "64-true",
    }
    if name == "accumulated" and strategy != "auto":
        settings |= {"rows": 2, "accumulate": 4}
    return common | METHODS[name] | settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks.save_model(folder / "model")
    for name, size in {"pool": 60, "validation": 27}.items():
        records = read_jsonl(TOY / f"{name}.jsonl")[:size]
        write_jsonl(folder / f"{name}.jsonl", records)
        pairs = [{"id": r["id"], "prompt": r["prompt"], "chosen": r["response"], "rejected": "b"} for r in records]
        write_jsonl(folder / f"pairs_{name}.jsonl", pairs)
    return folder


def both(folder: Path, pairs: list[tuple[str, str]], **settings) -> tuple[dict, dict]:
    one = [case(name, "auto", folder, **settings) for name in METHODS]
    two = [case(name, strategy, folder, **settings) for name, strategy in pairs]
    return ranks.runs(one, folder / "one", 1), ranks.runs(two, folder / "two", 2)


@pytest.fixture(scope="module")
def double(folder):
    return both(folder, QUICK)


@pytest.fixture(scope="module")
def others(folder):
    return both(folder, [pair for pair in PAIRS if pair not in QUICK])


@pytest.fixture(scope="module")
def single(folder):
    # a large eps, or Adam would make rounding noise as large as a gradient
    return both(folder, PAIRS, precision="32-true", eps=1e-4)


def same(ends, name, strategy, tolerance):
    one, two = ends[0][f"{name} auto"], ends[1][f"{name} {strategy}"]
    assert (one["weights"] - two["weights"]).abs().max() < tolerance
    assert (one["policy"] - two["policy"]).abs().max() < tolerance
    assert one["weights"].std() > 0.1


@pytest.mark.parametrize(("name", "strategy"), QUICK)
def test_two_processes_equal_one_in_float64(double, name, strategy):
    same(double, name, strategy, TOLERANCES["64-true"].get(name, 1e-9))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [pair for pair in PAIRS if pair not in QUICK])
def test_the_other_pairs_are_equal_in_float64_too(others, name, strategy):
    same(others, name, strategy, TOLERANCES["64-true"].get(name, 1e-9))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_two_processes_equal_one_in_float32(single, name, strategy):
    same(single, name, strategy, 1e-2 if METHODS[name]["solver"] == "OneStep" else 1e-4)  # takes differences


ACCUMULATED = {
    **{name: settings for name, settings in METHODS.items() if name != "accumulated"},
    "implicit": {"solver": "Implicit", "solver_settings": {"iterations": 2, "damping": 1.0}},
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_four_micro_batches_of_two_equal_one_of_eight(folder, name):
    known = name if name in METHODS else "penalty"
    common = case(known, "auto", folder) | ACCUMULATED[name] | {"steps": 8 if name == "implicit" else 15}
    found = []
    for batches in ({}, {"rows": 2, "accumulate": 4}):
        module, trainer = ranks.fitted(common | batches)
        assert trainer.global_step == common["steps"]
        policy = torch.cat([parameter.detach().flatten() for parameter in module.policy.trainable()])
        found.append((module.weights.table().clone(), policy))
    tolerance = TOLERANCES["64-true"].get(name, 1e-9)
    assert (found[0][0] - found[1][0]).abs().max() < tolerance
    assert (found[0][1] - found[1][1]).abs().max() < tolerance
    assert found[0][0].std() > 0.1


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint with manual optimization.*")
def test_steps_and_checkpoints_count_policy_steps_under_accumulation(folder, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings = {"rows": 2, "accumulate": 4, "steps": 5, "precision": "bf16-true", "lr": 1e-2}
    module, trainer = ranks.fitted(case("one_step", "auto", folder, **settings), [saved])
    assert trainer.global_step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["global_step"] == 4
    assert int(module.weights.visits.sum()) == 60 * 5 // 8
    assert {parameter.dtype for parameter in module.weights.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module.policy.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_layers_on_two_processes_equal_plain_ones_on_one(folder, compiler):
    names = ("one_step", "penalty")
    compiled = {"policy": {"compile": True}, "compiler": compiler}
    one = ranks.runs([case(name, "auto", folder, steps=6) for name in names], folder / "plain", 1)
    two = ranks.runs([case(name, "ddp", folder, steps=6, **compiled) for name in names], folder / compiler, 2)
    for name in names:
        same((one, two), name, "ddp", 1e-9)


@pytest.mark.slow
def test_two_processes_scale_and_skip_as_one(folder):
    """16-mixed; a scale that just fits, and one that must fall first, in steps that all processes skip together."""
    scales = {f"{name} 2^{power}": (name, 2.0**power) for name in ("one_step", "penalty") for power in (16, 40)}
    settings = {"precision": "16-mixed", "eps": 1e-4, "steps": 16}

    def cases(strategy: str) -> list[dict]:
        own = scales.items()
        return [case(n, strategy, folder, scale=scale, **settings) | {"name": name} for name, (n, scale) in own]

    one, two = ranks.runs(cases("auto"), folder / "scaled1", 1), ranks.runs(cases("ddp"), folder / "scaled2", 2)
    for name, (_, scale) in scales.items():
        logs = [ends[name]["weights"].log() for ends in (one, two)]
        assert one[name]["skipped"] == two[name]["skipped"]
        assert (two[name]["skipped"] > 1) is (scale == 2.0**40)
        assert (logs[0] - logs[1]).std() < 0.02 * logs[0].std()
        assert logs[0].std() > 0.1


def test_two_processes_see_every_monitor_row_once(double):
    """In one order, whoever had it: `checkpoint.tolerance` compares rows with themselves."""
    one, two = (ends[f"curated {strategy}"]["looks"] for ends, strategy in zip(double, ("auto", "ddp"), strict=True))
    assert one.shape == two.shape == (4, 5)
    assert (one - two).abs().max() < 1e-9
    assert (one[-1] - one[0]).abs().min() > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_draw_masks_of_their_own(double, strategy):
    """They are seeded alike; the first one draws what a single process draws."""
    first, second = double[1][f"penalty {strategy}"]["random"]
    assert first != second
    assert [first] == double[0]["penalty auto"]["random"]


def test_the_runs_move_the_policy(double, folder):
    from lit_bilevel.policy.load import PolicySettings, load_policy

    policy = load_policy(PolicySettings(str(folder / "model")), torch.float64)
    start = torch.cat([parameter.detach().flatten() for parameter in policy.trainable()])
    assert (double[0]["penalty auto"]["policy"] - start).abs().max() > 1e-2
