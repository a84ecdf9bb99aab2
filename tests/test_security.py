"""What comes from outside runs no code, becomes no markup and names no file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.files import TOY, read_jsonl, write_jsonl
from support.refining import refine_flags
from support.resuming import short

from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.inspection.text import table_cell
from lit_bilevel.policy.load import PolicySettings, load_policy, load_tokenizer

HOSTILE = "<script>alert(1)</script> | ![x](http://h/x) `c` \x1b[31m"


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the toy policy, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (TOY / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


class Payload:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_of_a_model_is_not_run(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        load_policy(PolicySettings(str(model)), torch.float32)
    assert not (tmp_path / "owned").exists()


def test_trusting_code_is_said_loudly():
    with pytest.warns(UserWarning, match=r"trust_remote_code` is ON: program code from .*toy/model"):
        load_tokenizer(PolicySettings(str(TOY / "model"), trust_remote_code=True))


def test_pickled_weights_are_read_only_where_that_is_asked_for(model):
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"safetensors.*allow_pickle"):
        load_policy(PolicySettings(str(model)), torch.float32)
    policy = load_policy(PolicySettings(str(model), allow_pickle=True), torch.float32)
    found = policy.model.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in weights.items())


def test_a_checkpoint_runs_no_code(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some scripts set, to read old files
    torch.save({"state_dict": Payload(tmp_path / "owned")}, tmp_path / "foreign.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "foreign.ckpt").read_bytes()[:100])
    for name, message in {
        "foreign": "could run code",
        "cut": "is no checkpoint that can be read",
        "none": "does not exist",
    }.items():
        assert main(["fit", *short(small, tmp_path / "run"), f"--ckpt_path={tmp_path / name}.ckpt"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_text_from_the_data_is_only_text_and_names_no_file(flags, small, tmp_path):
    """A whole run with refinement whose ids, sources and texts are hostile leaves the files of any other."""
    rows = read_jsonl(Path(small["pool"]))
    for number, row in enumerate(rows):
        row |= {"id": f"../../owned/{number}\x00", "source": f"/owned/../{number % 2}"}
        row["response"] = f"{HOSTILE}{number}"
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    truth = write_jsonl(tmp_path / "truth.jsonl", [{"id": r["id"], "corrupted": i < 9} for i, r in enumerate(rows)])
    folder = tmp_path / "files" / "run"
    arguments = refine_flags(flags, folder, "--trainer.max_epochs=2", f"--data.pool={pool}", f"--data.truth={truth}")
    assert main(["fit", *arguments]) == 0
    assert main(["predict", f"--config={folder / 'config.yaml'}"]) == 0
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["run"]
    assert not [path for path in tmp_path.rglob("*") if "owned" in path.name]
    assert not Path("/owned").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [
        value.tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("text_summary")
        for value in events.Tensors(tag)
    ]
    assert any("&lt;script&gt;" in text for text in shown)
    for text in shown:
        assert "<script" not in text
        assert "![x]" not in text
        assert "`c`" not in text
    assert "|" not in table_cell(HOSTILE)
