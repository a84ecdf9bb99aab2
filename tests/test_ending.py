"""The exported folder answers by plain `generate` as `predict` does, whatever the base asked for; contexts are kept."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import saved
from support.files import TOY, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_bilevel.__main__ import main
from lit_bilevel.callbacks import predict
from lit_bilevel.callbacks.export import Export
from lit_bilevel.generation.hf import answers
from lit_bilevel.policy.load import PolicySettings, load_policy
from lit_bilevel.types import Question

PROMPTS = ["add: 1+2", "upper: abc", "copy: hello", "x", "reverse: dog", "add: 70+6"]
BASES: dict[str, dict] = {
    "other end": {"eos_token_id": 5},
    "several ends": {"eos_token_id": [5, 7], "pad_token_id": 5},
    "no end": {"eos_token_id": None},
    "samples": {"eos_token_id": 5, "do_sample": True, "temperature": 3.0, "top_k": 0},
    "penalties": {"eos_token_id": 5, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 2},
    "lengths": {"eos_token_id": 5, "max_length": 3, "min_new_tokens": 11},
    "tokens": {"eos_token_id": 5, "suppress_tokens": list(range(100, 200)), "forced_eos_token_id": 9},
    "no meaning": {"eos_token_id": -1, "do_sample": False, "temperature": 0.3, "num_beams": 1},
}
SPECIAL: dict[str, dict] = {
    "none": {"pad_token": None},
    "end pads": {"pad_token": "<eos>"},
    "bos pads": {"bos_token": "a", "pad_token": "a"},
}


def base(folder: Path, settings: dict) -> str:
    """A sharp random Llama with these generation settings."""
    path = saved(folder, "llama", AutoTokenizer.from_pretrained(TOY / "model"))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return path


def most_likely(policy, tokenizer, prompt: str) -> int:
    """The fourth token of its answer, which makes a good end."""
    ids = tokenizer(prompt + "\n").input_ids
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(policy.causal_lm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-1]


def predicted(policy, tokenizer) -> list[str]:
    questions = [Question(i, str(i), p, tokenizer(p + "\n").input_ids) for i, p in enumerate(PROMPTS)]
    return [answer["response"] for answer in answers(policy, tokenizer, questions, 12)]


def generated(model, tokenizer, **given) -> list[str]:
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt + "\n", return_tensors="pt").input_ids  # no mask, as many forget it
        found.append(tokenizer.decode(model.generate(ids, **given)[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def export(policy, tokenizer, folder: Path) -> None:
    module = types.SimpleNamespace(policy=policy, tokenizer=tokenizer, max_new_tokens=12)
    Export()._write_policy(module, folder, None)


CASES = [("none", name) for name in BASES] + [(s, n) for s in ("end pads", "bos pads") for n in list(BASES)[:2]]


@pytest.mark.parametrize(("special", "name"), CASES)
def test_an_exported_model_answers_as_predict_does(tmp_path, name, special):
    policy = load_policy(PolicySettings(base(tmp_path / "base", BASES[name])), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model", **SPECIAL[special])
    if special != "end pads":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(most_likely(policy.eval(), tokenizer, PROMPTS[0]))
    tokenizer.save_pretrained(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")  # where its end is a control token now
    expected = predicted(policy, tokenizer)
    export(policy, tokenizer, tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert generated(model, AutoTokenizer.from_pretrained(tmp_path / "policy")) == expected
    assert len({len(text) for text in expected}) > 1 or special == "end pads"  # some end by themselves


@pytest.mark.parametrize("name", BASES)
def test_an_exported_adapter_answers_as_predict_does(tmp_path, name):
    """peft keeps the base's settings; those of the folder are put in their place, or handed over."""
    path = base(tmp_path / "base", BASES[name])
    policy = load_policy(PolicySettings(path), torch.float32)
    policy.model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(most_likely(policy.eval(), tokenizer, PROMPTS[0]))
    expected = predicted(policy, tokenizer)
    export(policy, tokenizer, tmp_path / "policy")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "policy")
    settings = GenerationConfig.from_pretrained(tmp_path / "policy")
    if name not in ("tokens", "lengths"):  # which `generate` takes from the base where they are not said
        assert generated(model, tokenizer, generation_config=settings) == expected
    model.generation_config = model.base_model.model.generation_config = settings
    assert generated(model, tokenizer) == expected


# ---- contexts ----


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_answers_end_where_the_context_does(flags, tmp_path, monkeypatch, name):
    key = "n_positions" if name == "gpt2" else "max_position_embeddings"
    path = saved(tmp_path / "model", name, AutoTokenizer.from_pretrained(TOY / "model"), **{key: 64})
    given = [*flags, f"--model.policy.path={path}", "--data.max_length=128", "--model.max_new_tokens=256"]
    told: list[str] = []
    monkeypatch.setattr(predict, "rank_zero_info", told.append)
    assert main(["predict", *given]) == 0
    assert ["was made for 64 tokens, so answers to 16 of 16 test prompts" in text for text in told] == [True, False]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    found = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    assert len(found) == 16
    for record in found[:4]:
        ids = torch.tensor([tokenizer(record["prompt"] + "\n").input_ids])
        out = model.generate(ids, max_length=64, do_sample=False, eos_token_id=[2, tokenizer.eos_token_id])
        assert record["response"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_prompts_without_room_are_refused_by_name(flags, tmp_path, capsys):
    test = write_jsonl(
        tmp_path / "test.jsonl",
        [{"id": "fits", "prompt": "add: 1+1", "response": "y" * 90}]
        + [{"id": f"long-{n}", "prompt": "x" * 70 + str(n), "response": "y"} for n in range(7)],
    )
    path = saved(tmp_path / "model", "gpt2", AutoTokenizer.from_pretrained(TOY / "model"), n_positions=64)
    given = [*flags, f"--model.policy.path={path}", f"--data.test={test}", "--data.max_length=256"]
    assert main(["predict", *given]) == 2
    said = capsys.readouterr().err
    assert "was made for 64 tokens, and the test prompts 'long-0', 'long-1'" in said
    assert "and 2 more have" in said
    assert "fits" not in said


def test_tokens_beyond_the_embeddings_are_refused_before_the_model_is_loaded(flags, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    path = saved(tmp_path / "model", "llama", tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(path)
    (tmp_path / "model" / "model.safetensors").unlink()
    test = write_jsonl(tmp_path / "test.jsonl", [{"id": "n", "prompt": "no", "response": "no"}])
    given = [*flags, f"--model.policy.path={path}", f"--data.test={test}"]
    pool = [{"id": f"p{n}", "prompt": f"add: {n}", "response": "<two>" if n == 3 else "2"} for n in range(20)]
    where = write_jsonl(tmp_path / "pool.jsonl", pool)
    assert main(["fit", *given, f"--data.pool={where}", "--data.truth=null"]) == 2
    said = capsys.readouterr().err
    assert "the policy has embeddings for 264 tokens and its tokenizer has 266; row 'p3' of the pool rows" in said


def test_the_tokenizer_of_the_data_is_the_one_that_ends_and_is_exported(flags, tmp_path):
    """A base model whose own tokenizer ends elsewhere: what makes the rows decides."""
    own = AutoTokenizer.from_pretrained(TOY / "model")
    path = saved(tmp_path / "model", "llama", own)
    own.eos_token = "~"
    own.save_pretrained(tmp_path / "chat")
    given = [*flags, f"--model.policy.path={path}", f"--data.tokenizer={tmp_path / 'chat'}", "--trainer.max_steps=2"]
    assert main(["fit", *given]) == 0
    folder = tmp_path / "run" / "policy"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "~"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [own.eos_token_id, 2]
    assert settings["do_sample"] is False
