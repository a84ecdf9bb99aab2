"""A run with compiled layers leaves the same files as any other, and continues from its checkpoints."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file
from support.files import TOY

from lit_bilevel.cli import BilevelCLI

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself


def runs(flags, tmp_path) -> None:
    flags = [*flags, "--model.policy.compile=true", "--checkpoint.every_n_steps=1", "--trainer.max_epochs=-1"]
    flags = [*flags, "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    whole, parts = (f"--trainer.default_root_dir={tmp_path / name}" for name in ("whole", "parts"))
    model = BilevelCLI(["fit", *flags, whole, "--trainer.max_steps=4"]).model
    assert model.policy.compiled
    BilevelCLI(["fit", *flags, parts, "--trainer.max_steps=2"])
    BilevelCLI(["fit", *flags, parts, "--trainer.max_steps=4", "--ckpt_path=last"])
    last = [torch.load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("whole", "parts")]
    assert last[0].keys() == last[1].keys()
    for name, value in last[0].items():
        assert torch.allclose(value, last[1][name], rtol=1e-4, atol=1e-5), name
    names = load_file(TOY / "model" / "model.safetensors").keys()
    assert load_file(tmp_path / "whole" / "policy" / "model.safetensors").keys() == names


@pytest.mark.slow
def test_traced_layers(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    runs(flags, tmp_path)


@pytest.mark.slow
def test_compiled_layers(flags, tmp_path):
    runs(flags, tmp_path)
