"""The same objects in a second fit: each goes on, begins anew, or is refused by name; none finishes with a lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from conftest import TOY, read_jsonl, write_jsonl
from lightning.pytorch import Trainer

from lit_bilevel import (
    BilevelCheckpoint,
    BilevelDataModule,
    Export,
    LitBilevel,
    LowestFraction,
    OneStep,
    PolicySettings,
    Sampling,
    SelfNormalised,
    SelfRefine,
    SoftmaxWeights,
    Summary,
    ValueFunction,
    WeightInspector,
)
from lit_bilevel.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*ModelCheckpoint with manual optimization.*")


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> dict[str, str]:
    """Two pools of 16 rows, one of 20, and the other sets."""
    folder, rows = tmp_path_factory.mktemp("reuse"), read_jsonl(TOY / "pool.jsonl")
    parts = {"first": rows[:16], "other": rows[16:32], "longer": rows[:20]}
    parts |= {name: read_jsonl(TOY / f"{name}.jsonl")[:10] for name in ("validation", "test")}
    return {name: write_jsonl(folder / f"{name}.jsonl", part) for name, part in parts.items()}


def data(pools, pool: str = "first", **settings) -> BilevelDataModule:
    sets = {name: pools[name] for name in ("validation", "test")}
    return BilevelDataModule(pools[pool], **sets, batch_size=4, max_length=64, seed=0, **settings)


def module(solver=None, weights=None, path: str = str(TOY / "model"), **settings) -> LitBilevel:
    torch.manual_seed(0)
    return LitBilevel(
        PolicySettings(path),
        weights or SoftmaxWeights(),
        solver or OneStep(),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        **settings,
    )


def trainer(folder: Path, *callbacks, steps: int = 4) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(callback, BilevelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


@pytest.mark.parametrize("pool", ["other", "longer"])
def test_a_module_that_learned_on_another_pool_is_refused(pools, tmp_path, pool):
    made = module()
    trainer(tmp_path).fit(made, data(pools))
    with pytest.raises(
        UserError, match=r"was fitted to another pool \(16 rows; this one has (16|20)\).*make a new one"
    ):
        trainer(tmp_path).fit(made, data(pools, pool))


def test_a_module_that_was_only_tested_takes_another_pool(pools, tmp_path):
    made = module()
    trainer(tmp_path).test(made, data(pools), verbose=False)
    trainer(tmp_path).fit(made, data(pools, "longer"))
    assert made.weights.pool_rows == 20
    trainer(tmp_path).test(made, data(pools), verbose=False)  # a trained policy may be tested on anything


def test_a_module_goes_on_with_the_same_pool(pools, tmp_path):
    made = module()
    trainer(tmp_path).fit(made, data(pools))
    before = made.weights.table().clone()
    trainer(tmp_path).fit(made, data(pools))
    assert made.weights.visits.tolist() == [2] * 16
    assert (made.weights.table() - before).abs().max() > 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", "the `SoftmaxWeights` learned in another `LitBilevel`; make new ones"),
        ("one_step", "the `OneStep` holds what another run left; make a new one"),
        ("value_function", "the `ValueFunction` holds what another run left; make a new one"),
        ("rule", "the `SelfNormalised` holds what another run left; make a new one"),
    ],
)
def test_a_part_that_learned_in_another_module_is_refused(pools, tmp_path, part, message):
    solver = {"one_step": OneStep, "value_function": ValueFunction}.get(part)
    shared = {"solver": solver()} if solver else {"weights": SoftmaxWeights()} if part == "weights" else {}
    callbacks: list = []
    if part == "rule":
        shared = {"response_weights": SelfNormalised()}
        shared["response_weights"].follow(torch.ones(2))
        callbacks = [SelfRefine(every_n_steps=100)]
    else:
        trainer(tmp_path).fit(module(**shared), data(pools))
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, *callbacks).fit(module(**shared), data(pools))


def test_a_trainer_that_has_trained_is_refused(pools, tmp_path):
    """It would count on, find that its steps are done, and leave an untrained policy."""
    used = trainer(tmp_path)
    used.fit(module(), data(pools))
    with pytest.raises(UserError, match="this Trainer has made 4 steps already and would count on; make a new"):
        used.fit(module(), data(pools))


def test_counts_of_faults_begin_anew(pools, tmp_path):
    made = module()
    trainer(tmp_path).fit(made, data(pools))
    made.guard.skipped, made.guard.in_a_row, made.guard.reason = 3, 9, "an earlier fault"
    made.guard._told.add("weights")
    trainer(tmp_path).fit(made, data(pools))
    assert (made.guard.skipped, made.guard.in_a_row, made.guard.reason, made.guard._told) == (0, 0, None, set())


def refine(**settings) -> SelfRefine:
    common = {"every_n_steps": 2, "keep_unfinished": True, "sampling": Sampling(4), "on_doubt": "replace"}
    return SelfRefine(LowestFraction(0.25), **common | settings)


def test_data_of_a_refined_run_begin_anew_with_another_module(pools, tmp_path):
    """Their generated responses are of another policy, and no groups are there to weigh them."""
    used = data(pools)
    trainer(tmp_path, refine()).fit(module(), used)
    assert len(used.responses) > 0
    fresh, again = module(), module()
    trainer(tmp_path).fit(fresh, used)
    trainer(tmp_path).fit(again, data(pools))
    assert len(used.responses) == 0
    assert torch.equal(fresh.weights.table(), again.weights.table())


def test_a_refined_module_begins_anew_with_its_rows(pools, tmp_path):
    """Else its refined rows would weigh nothing where no response stands for them."""
    made = module()
    trainer(tmp_path, refine()).fit(made, data(pools))
    assert made.refinement.active
    trainer(tmp_path).fit(made, data(pools))
    assert not made.refinement.active
    assert made.refinement.table()[0].tolist() == []


def test_refining_twice_with_one_callback(pools, tmp_path):
    callback, files = refine(every_n_steps=3, start=3), []
    for name in ("one", "two"):
        trainer(tmp_path / name, callback).fit(module(), data(pools))
        files.append((tmp_path / name / "responses.jsonl").read_text())
    assert files[0].count("\n") > 0
    assert files[0] == files[1]


def test_one_data_module_for_two_tokenizers(pools, tmp_path):
    """The ids are those of the tokenizer of the module at hand."""
    from transformers import AutoTokenizer

    path = tmp_path / "model"
    path.mkdir()
    for file in (TOY / "model").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}!{% endif %}{% endfor %}"
    tokenizer.save_pretrained(path)
    used, fresh = data(pools), data(pools)
    trainer(tmp_path).test(module(), used, verbose=False)
    first = used.sets["pool"][0]["input_ids"]
    trainer(tmp_path).test(module(path=str(path)), used, verbose=False)
    trainer(tmp_path).test(module(path=str(path)), fresh, verbose=False)
    assert used.sets["pool"][0]["input_ids"] == fresh.sets["pool"][0]["input_ids"] != first


def test_a_resumed_run_leaves_no_position_for_the_next(pools, tmp_path):
    used = data(pools)
    first = trainer(tmp_path, steps=2)
    first.fit(module(), used)
    first.save_checkpoint(tmp_path / "c.ckpt")
    other = data(pools)
    other._own_seed = other.seed = 7
    trainer(tmp_path).fit(module(), other, ckpt_path=tmp_path / "c.ckpt")
    assert (other._position, other.seed) == (2, 0)
    trainer(tmp_path).fit(module(), other)
    assert (other._position, other.seed) == (0, 7)
    assert other._stream is not None
    assert other._stream.position == 4


def test_callbacks_leave_nothing_of_an_earlier_fit(pools, tmp_path):
    """The best state, the folder, the test before the first step, and what was skipped are of the run at hand."""
    callbacks = [BilevelCheckpoint(), Export(), Summary(), WeightInspector()]
    used = data(pools)
    for name in ("one", "two"):
        run = tmp_path / name
        trainer(run, *callbacks).fit(module(), used)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        assert Path(callbacks[0].best_model_path).parent == (run / "checkpoints")
        assert len(callbacks[2].monitor_losses) == 2
        assert (run / "policy" / "model.safetensors").is_file()
    tables = [pyarrow.parquet.read_table(tmp_path / name / "weights.parquet").to_pydict() for name in ("one", "two")]
    assert tables[0] == tables[1]
    callbacks[0].best_model_score = torch.tensor(-1.0)
    callbacks[0].best_k_models = {"best.ckpt": torch.tensor(-1.0)}
    callbacks[1]._resumed = True
    trainer(tmp_path / "one", *callbacks).fit(module(), used)  # in the folder of the first one
    assert callbacks[0].best_model_score > 0
    assert (tmp_path / "one" / "checkpoints" / "best.ckpt").is_file()
