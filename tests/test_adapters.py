"""Policy folders that hold an adapter: continued, merged under a new one, or refused, and never left out unsaid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from support.files import TOY
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_bilevel import LitBilevel, LoraSettings, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.cli import BilevelCLI, main
from lit_bilevel.comparison.filters.evidence import Evidence
from lit_bilevel.errors import UserError
from lit_bilevel.generation.backends import VLLM
from lit_bilevel.objectives import DPO
from lit_bilevel.policy.load import load_policy, load_tokenizer
from lit_bilevel.policy.origin import tokenizer_path

NEW = LoraSettings(r=2, alpha=4, target_modules=["q_proj"])
IDS = torch.arange(10, 26)[None]


def save_adapter(folder: Path, config=None, tokenizer: bool = True) -> str:
    """An adapter on the toy model with values that change its answers, as peft saves it."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    config = config or LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return str(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def expected(path: str) -> torch.Tensor:
    """What peft itself makes of an adapter folder."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "model"), path))


def edit(path: str, **values) -> None:
    file = Path(path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


KINDS = {
    "lora": None,
    "rslora": LoraConfig(r=3, use_rslora=True, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "patterns": LoraConfig(r=3, rank_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "norms saved whole": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_continued_as_peft_reads_it(tmp_path, kind):
    path = save_adapter(tmp_path / "a", KINDS[kind])
    for setting in (None, "continue"):
        policy = load_policy(PolicySettings(path, adapter=setting), torch.float32)
        assert torch.equal(logits(policy.model), expected(path))
        tuned = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert tuned
        assert all("lora_" in name or "modules_to_save" in name for name in tuned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, NEW], ids=["whole", "new adapter"])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, kind, lora):
    path = save_adapter(tmp_path / "a", KINDS[kind])
    policy = load_policy(PolicySettings(path, lora=lora, adapter="merge"), torch.float32)
    assert torch.allclose(logits(policy.model), expected(path), atol=2e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(TOY / "model"))
    assert not torch.allclose(logits(policy.model), plain, atol=0.1)
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if lora is None:
        assert not any("lora_" in name for name in names)
        assert len(names) == sum(1 for _ in policy.parameters())
    else:
        assert all("lora_" in name and "q_proj" in name for name in names)


def refused(path: str, message: str, **settings) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_policy(PolicySettings(path, **settings), torch.float32)
    assert "\n" not in str(caught.value)


def test_an_adapter_and_settings_of_a_new_one_need_a_word(tmp_path):
    path = save_adapter(tmp_path / "a")
    refused(
        path,
        r"holds an adapter of rank 3 .*`--model.policy.adapter continue .*`--model.policy.adapter merge`",
        lora=NEW,
    )
    refused(path, r"`r` is 2 and the adapter has 3; .*leave `lora` out", lora=NEW, adapter="continue")
    same = LoraSettings(r=3, alpha=6, target_modules=["v_proj", "q_proj"])
    assert torch.equal(
        logits(load_policy(PolicySettings(path, lora=same, adapter="continue"), torch.float32).model), expected(path)
    )
    refused(path, r"`model.policy.quantization` is 4bit.*rounds", adapter="merge", lora=NEW, quantization="4bit")
    refused(str(TOY / "model"), r"holds no adapter", adapter="merge")


def test_adapters_that_cannot_be_read_are_refused_for_what_they_are(tmp_path):
    ia3 = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    refused(save_adapter(tmp_path / "ia3", ia3), "an adapter of the kind IA3, and only LoRA is read")
    path = save_adapter(tmp_path / "a")
    copies = iter(str(shutil.copytree(path, tmp_path / f"copy{i}")) for i in range(9))
    no_base = next(copies)
    edit(no_base, base_model_name_or_path=None)
    refused(no_base, "does not say which model it is for")
    gone = next(copies)
    edit(gone, base_model_name_or_path=str(tmp_path / "gone"))
    refused(gone, r"is for '.*gone', which could not be loaded .*`base_model_name_or_path`")
    chain = next(copies)
    edit(chain, base_model_name_or_path=path)
    refused(chain, "which holds an adapter itself")
    shape = next(copies)
    edit(shape, r=5)
    refused(shape, "does not fit its base")
    layers = next(copies)
    edit(layers, target_modules=["q_proj", "v_proj", "k_proj"])
    refused(layers, r"does not fit its base .*no counterpart, the first is '.*k_proj")
    empty = Path(next(copies))
    (empty / "adapter_model.safetensors").unlink()
    refused(str(empty), "and no weights")
    both = Path(next(copies))
    shutil.copy(TOY / "model" / "model.safetensors", both)
    refused(str(both), r"holds an adapter .* and a whole model")
    broken = Path(next(copies))
    (broken / "adapter_config.json").write_text("{")
    refused(str(broken), "cannot be read")
    pickled = Path(next(copies))
    from safetensors.torch import load_file

    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    refused(str(pickled), "is pickled")
    read = load_policy(PolicySettings(str(pickled), allow_pickle=True), torch.float32)
    assert torch.equal(logits(read.model), expected(path))


def test_the_tokenizer_of_an_adapter_without_one_is_that_of_its_base(tmp_path):
    bare, own = (save_adapter(tmp_path / name, tokenizer=name == "own") for name in ("bare", "own"))
    assert tokenizer_path(PolicySettings(bare)) == str(TOY / "model")
    assert tokenizer_path(PolicySettings(own)) == own
    assert load_tokenizer(PolicySettings(bare)).eos_token_id == load_tokenizer(PolicySettings(own)).eos_token_id


def test_a_reference_is_the_start_of_the_run_or_refused(tmp_path):
    path = save_adapter(tmp_path / "a")
    for settings in (PolicySettings(path), PolicySettings(path, lora=NEW, adapter="continue")):
        with pytest.raises(UserError, match=r"no new one; .*`--model.policy.adapter merge`"):
            LitBilevel(settings, SoftmaxWeights(), OneStep(), lower_objective=DPO())
    policy = load_policy(PolicySettings(path, lora=NEW, adapter="merge"), torch.float32)
    policy.check_reference()
    with policy.without_adapter():
        assert torch.allclose(logits(policy.model), expected(path), atol=2e-4)


def test_vllm_does_not_take_a_merged_base_for_the_named_one(tmp_path):
    policy = load_policy(PolicySettings(save_adapter(tmp_path / "a"), lora=NEW, adapter="merge"), torch.float32)
    with pytest.raises(UserError, match="an adapter was merged into it"):
        VLLM()._adapter(None, policy, str(tmp_path))


# ---- whole runs ----

LORA = "--model.policy.lora={r: 3, alpha: 6, target_modules: [q_proj, v_proj]}"


@pytest.fixture
def first(flags, tmp_path) -> Path:
    """The `policy/` of a short run with an adapter."""
    assert main(["fit", *flags, LORA, "--trainer.max_steps=4"]) == 0
    return (tmp_path / "run").rename(tmp_path / "first") / "policy"


def further(flags, tmp_path, name: str, *more: str) -> Path:
    folder = tmp_path / name
    assert main(["fit", *flags, "--trainer.max_steps=4", f"--trainer.default_root_dir={folder}", *more]) == 0
    return folder


def test_the_policy_of_a_run_is_continued_or_merged_by_the_next(flags, tmp_path, first, caplog):
    caplog.set_level("INFO")
    start = expected(str(first))
    path = f"--model.policy.path={first}"
    run = further(flags, tmp_path, "continued", path)
    config = json.loads((run / "policy" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, "lit_bilevel/toy/model")
    assert not torch.equal(expected(str(run / "policy")), start)
    card = (run / "policy" / "README.md").read_text()
    assert 'base_model: "model"' in card
    assert "the adapter in policy (rank 3, on model) is continued" in card
    assert f"the adapter in {first} (rank 3, on lit_bilevel/toy/model) is continued" in caplog.text
    begin = json.loads((first.parent / "metrics.json").read_text())["test/loss"]
    first_lines = [r.getMessage() for r in caplog.records if "parameters are trained" in r.getMessage()]
    assert "is continued" in first_lines[0]
    assert f"{begin:.4f}" in card  # the loss before the run is the one that the first run ended with

    run = further(flags, tmp_path, "merged", path, "--model.policy.adapter=merge", "--model.policy.lora={r: 2}")
    config = json.loads((run / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "policy" / "base")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(run / "policy" / "base")), start, atol=2e-4)
    assert "is merged into its base, which is tuned by a new adapter" in (run / "policy" / "README.md").read_text()
    moved = run.rename(tmp_path / "moved") / "policy"
    answers = ["predict", *flags, f"--model.policy.path={moved}", f"--trainer.default_root_dir={tmp_path / 'answers'}"]
    assert main(answers) == 0
    assert len((tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()) == 16

    run = further(flags, tmp_path, "whole", path, "--model.policy.adapter=merge")
    assert (run / "policy" / "model.safetensors").is_file()
    assert not (run / "policy" / "adapter_config.json").exists()


def test_a_run_does_not_begin_by_removing_its_own_policy(flags, tmp_path, capsys):
    own = Path(save_adapter(tmp_path / "run" / "policy"))
    assert main(["fit", *flags, f"--model.policy.path={own}"]) == 2
    assert "which this run would replace by its own policy" in capsys.readouterr().err
    assert (own / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("more", [[], ["--model.policy.adapter=merge"], ["--model.policy.adapter=merge", LORA]])
def test_filters_see_the_policy_that_a_run_starts_from(flags, tmp_path, more):
    path = save_adapter(tmp_path / "a")
    cli = BilevelCLI([*flags, f"--model.policy.path={path}", *more], run=False)
    untuned = Evidence(cli, None, 0).policy()
    assert torch.allclose(logits(untuned.model), expected(path), atol=2e-4)
