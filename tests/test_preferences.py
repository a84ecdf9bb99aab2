"""Preference pairs from file to batch, and runs that learn from them: refusals, resuming, swapped pairs."""

from __future__ import annotations

import signal
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from support import ranks
from support.files import TOY, read_jsonl, write_jsonl
from support.mortal import same
from support.pairs import adapted
from support.resuming import Signal, fit
from support.sources import Source
from transformers import AutoTokenizer

from lit_bilevel import (
    DPO,
    BilevelDataModule,
    ExponentiatedGradient,
    LitBilevel,
    LoraSettings,
    Mixing,
    OneStep,
    PolicySettings,
    SelfRefine,
    SigmoidWeights,
    SoftmaxWeights,
    UniformWeights,
)
from lit_bilevel.cli import main
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.pairs import encode_with_pairs
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.truth import aurocs
from lit_bilevel.policy.load import load_policy
from lit_bilevel.types import Row

TOY_LORA = ["--model.policy.lora.r=4", "--model.policy.lora.target_modules=[q_proj, v_proj]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random GPT-NeoX, which keeps float64 throughout."""
    folder = tmp_path_factory.mktemp("model")
    ranks.save_model(folder)
    return str(folder)


# ---- pairs, from file to batch ----


HH = "\n\nHuman: What is a cat?\n\nAssistant: A small animal.\n\nHuman: And a dog?\n\nAssistant: {}"


def test_transcripts_are_read_as_conversations(tmp_path):
    record = {"chosen": HH.format("Another.\n\nIt barks."), "rejected": HH.format("A wolf.")}
    path = write_jsonl(tmp_path / "p.jsonl", [record])
    row = Source(path, pairs="required").rows()[0]
    assert row.history == (("user", "What is a cat?"), ("assistant", "A small animal."))
    assert (row.prompt, row.response, row.rejected) == ("And a dog?", "Another.\n\nIt barks.", "A wolf.")
    assert Source(path).rows()[0].rejected is None
    for bad, message in (
        (record | {"rejected": HH.replace("cat", "rat").format("A wolf.")}, "do not answer the same question"),
        (record | {"rejected": HH.format("")}, "turn 4 of `rejected` is empty"),
        (record | {"rejected": "\n\nHuman: a"}, "must end with a user turn and an assistant turn"),
        (record | {"rejected": record["chosen"] + " "}, "`chosen` and `rejected` hold the same answer"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{message}"):
            Source(write_jsonl(tmp_path / "bad.jsonl", [bad]), pairs="required").rows()


@pytest.mark.parametrize("truncation", ["left", "right"])
@pytest.mark.parametrize("max_length", [200, 12, 8])
def test_both_answers_follow_the_same_prompt(truncation, max_length):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    rows = [Row(0, "0", "abcdef", "ok", "", rejected="not at all"), Row(1, "1", "ab", "yes", "", rejected="no")]
    for one, row in zip(encode_with_pairs(Encoder(tokenizer, max_length, truncation), rows), rows, strict=True):
        ids, other, start = one.input_ids, one.rejected_ids, one.response_start
        assert ids[:start] == other[:start]
        assert (row.prompt + "\n").endswith(tokenizer.decode(ids[:start]))
        for answer, text in ((ids, row.response), (other, row.rejected)):
            assert len(answer) <= max_length
            assert (text + tokenizer.eos_token).startswith(tokenizer.decode(answer[start:]))
        if max_length == 200:
            assert tokenizer.decode(other[start:]) == f"{row.rejected}{tokenizer.eos_token}"
            assert not one.truncated
    same_start = encode_with_pairs(
        Encoder(tokenizer, 10, "right"), [Row(0, "0", "abcdef", "same A", "", rejected="same B")]
    )
    assert "the same tokens up to `data.max_length`" in str(same_start[0])


def as_pairs(records: list[dict], swapped: Collection[int] = ()) -> list[dict]:
    """Right answers against the right answer to another question of the same task; the two exchanged in some rows."""
    found = []
    for i, record in enumerate(records):
        others = [*records[i + 1 :], *records[:i]]
        task = [other for other in others if other["prompt"].split(":")[0] == record["prompt"].split(":")[0]] or others
        wrong = next(other["response"] for other in task if other["response"] != record["response"])
        answers = [record["response"], wrong]
        chosen, rejected = reversed(answers) if i in swapped else answers
        found.append({"id": record["id"], "prompt": record["prompt"], "chosen": chosen, "rejected": rejected})
    return found


def test_what_the_files_must_hold_is_said_by_name(small, tmp_path):
    toy = PolicySettings(str(TOY / "model"), lora=LoraSettings(r=2))
    plain = {name: small[name] for name in ("pool", "validation", "test")}
    paired = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", as_pairs(read_jsonl(TOY / f"{name}.jsonl")[:30]))
        for name in plain
    }

    def read(levels, **files) -> BilevelDataModule:
        data = BilevelDataModule(**plain | files, tokenizer=toy.path)
        data.pair_levels = levels
        data.setup()
        return data

    with pytest.raises(UserError, match=r"pool.jsonl, line 1: the format is prompt_response, .* `rejected`"):
        read(["lower"])
    with pytest.raises(UserError, match=r"validation.jsonl, line 1: the format is prompt_response"):
        read(["upper"])
    kept = read(["lower"], pool=paired["pool"], test=paired["test"])
    ignored = read([], pool=paired["pool"], test=paired["test"])
    for name in ("pool", "test"):
        assert kept.sets[name]["rejected_ids"][0]
        assert ignored.sets[name]["rejected_ids"][0] is None
        assert kept._examples(name)([0])[0].rejected_ids
    assert kept._examples("upper")([0])[0].rejected_ids is None
    assert kept.fingerprint["sets"]["pool"] != ignored.fingerprint["sets"]["pool"]
    assert kept.fingerprint["sets"]["upper"] == ignored.fingerprint["sets"]["upper"]
    equal = as_pairs(read_jsonl(TOY / "pool.jsonl")[:30])
    equal[3]["rejected"] = equal[3]["chosen"]
    bad = write_jsonl(tmp_path / "equal.jsonl", equal)
    with pytest.raises(UserError, match=r"equal.jsonl, line 4: .*hold the same answer"):
        read(["lower"], pool=bad)
    data = BilevelDataModule(bad, plain["validation"], tokenizer=toy.path, on_bad_row="skip")
    data.pair_levels = ["lower"]
    data.setup()
    assert len(data.sets["pool"]) == 29
    assert len(data.skipped["pool"]) == 1


# ---- refusals ----


def test_what_cannot_work_is_refused_at_the_start(small, model):
    with pytest.raises(UserError, match=r"`beta` of `DPO` is 0"):
        DPO(0)
    plain = PolicySettings(str(TOY / "model"))
    with pytest.raises(UserError, match=r"`model.upper_objective` is `DPO`.*`--model.policy.lora '\{r: 16"):
        LitBilevel(plain, SoftmaxWeights(), OneStep(), upper_objective=DPO())
    adapter = PolicySettings(str(TOY / "model"), lora=LoraSettings(r=2))
    module = LitBilevel(adapter, SoftmaxWeights(), OneStep(), lower_objective=DPO())
    with pytest.raises(UserError, match=r"`SelfRefine` replaces answers, .*`model.lower_objective` learns from pairs"):
        SelfRefine().on_fit_start(SimpleNamespace(world_size=1), module)
    with pytest.raises(UserError, match=r"has no adapter to switch off; tune a LoRA adapter"):
        load_policy(plain, torch.float32).check_reference()
    policy = adapted(model)
    policy.check_reference()
    policy.causal_lm.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"without its adapter the policy is not the reference, because of '.*embed_in"):
        policy.check_reference()


# ---- runs ----


@pytest.fixture(scope="module")
def preferences(small, tmp_path_factory) -> dict[str, str]:
    """The small files, validation and test as pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    found = {
        name: write_jsonl(folder / f"{name}.jsonl", as_pairs(read_jsonl(Path(small[name]))))
        for name in ("validation", "test")
    }
    return {**small, **found}


def run_flags(files: dict[str, str], folder) -> list[str]:
    return [
        "--config=configs/quickstart.yaml",
        *(f"--data.{name}={path}" for name, path in files.items()),
        *TOY_LORA,
        "--model.upper_objective=DPO",
        "--model.upper_objective.beta=0.2",
        "--model.optimizer.init_args.lr=0.003",
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=4",
        "--trainer.enable_progress_bar=false",
        "--figures.enabled=false",
        f"--trainer.default_root_dir={folder}",
    ]


def test_a_run_that_is_stopped_and_continued_ends_with_the_same_bits(preferences, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["fit", *run_flags(preferences, whole)]) == 0
    with pytest.raises(SystemExit):
        fit(run_flags(preferences, parts), callbacks=(Signal("on_train_batch_end", 5, signal.SIGINT),))
    assert main(["fit", *run_flags(preferences, parts), "--ckpt_path=last"]) == 0
    same(whole, parts)


def test_other_objectives_than_the_checkpoint_was_trained_under_are_refused(preferences, tmp_path, capsys):
    flags = run_flags(preferences, tmp_path)
    assert main(["fit", *flags, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *flags, "--model.upper_objective=SFT", "--ckpt_path=last"]) == 2
    assert "`data.validation`" in capsys.readouterr().err


def trained(settings: dict, data: BilevelDataModule, steps: int, folder) -> LitBilevel:
    torch.manual_seed(0)
    policy = PolicySettings(str(TOY / "model"), lora=LoraSettings(r=8, alpha=16))
    module = LitBilevel(
        policy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        weight_optimizer=partial(ExponentiatedGradient, lr=0.5),
        **settings,
    )
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swapped_pairs_of_a_pool_end_with_lower_weights(tmp_path, seed):
    """A third of the pool's pairs prefer the wrong answer; the trusted pairs tell, and equal weights learn less."""
    pool = read_jsonl(TOY / "pool.jsonl")
    truth = read_jsonl(TOY / "truth.jsonl")
    clean = [record for record, known in zip(pool, truth, strict=True) if not known["corrupted"]][:180]
    swapped = set(range(0, 180, 3))
    paths = [write_jsonl(tmp_path / "pool.jsonl", as_pairs(clean, swapped))]
    for name in ("validation", "test"):
        records = read_jsonl(TOY / f"{name}.jsonl")[:120]
        paths.append(write_jsonl(tmp_path / f"{name}.jsonl", as_pairs(records)))
    settings = {"upper_weight": 0.2, "upper_objective": DPO(), "lower_objective": DPO()}
    found = {}
    for weights, solver in ((UniformWeights(), Mixing()), (SigmoidWeights(), OneStep())):
        data = BilevelDataModule(*paths, batch_size=16, seed=seed)
        module = trained(settings | {"weights": weights, "solver": solver}, data, 60, tmp_path)
        found[type(weights)] = metrics = module.trainer.test(module, data, verbose=False)[0]
    kinds = ["swapped" if i in swapped else "" for i in range(180)]
    assert aurocs(module.weights.table(), kinds)["all"] > 0.8
    assert set(metrics) == {"test/loss", "test/loss_per_token", "test/preference_loss", "test/accuracy"}
    assert metrics["test/accuracy"] > 0.75
    assert metrics["test/preference_loss"] < 0.6
    assert metrics["test/accuracy"] > found[UniformWeights]["test/accuracy"] + 0.05
