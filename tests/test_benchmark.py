"""What the benchmarks say of a model is true of it, and what they promise of memory holds."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest
from support.files import ROOT
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "scripts"))
from benchmarks import memory as benchmark_memory
from benchmarks import step as benchmark_step


def test_a_method_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark_step.main(["--only", "mixin"])
    assert "invalid choice: 'mixin'" in capsys.readouterr().err


def test_operations_are_counted_from_the_parameters_of_the_model(tmp_path):
    options = Namespace(hidden=96, layers=2, vocabulary=300, tokens=32, batch_size=2, precision="32-true")
    model = AutoModelForCausalLM.from_pretrained(benchmark_step.save_model(options, tmp_path / "model"))
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert benchmark_step.parameters(options) == sum(p.numel() for p in model.parameters()) - norms
    tokens, response = 2 * 2 * 32, 2 * 2 * 16
    pairs = 2 * 2 * 32 * 32 / 2  # of a causal attention, each 2·D operations for scores and as many for values
    forward = 2 * benchmark_step.body_parameters(options) * tokens + 2 * 96 * 300 * response + 2 * 4 * 96 * pairs
    assert benchmark_step.step_flops(options) == 3 * forward


@pytest.mark.slow
def test_the_losses_take_a_quarter_of_the_memory_of_full_logits(capsys):
    assert benchmark_memory.main(["--repeats=1"]) == 0
