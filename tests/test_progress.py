"""Bars and lines of a fit and of generation."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from lit_bilevel import LitBilevel, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.callbacks.progress import Bar, GenerationBar, Lines, Rate


def progress_of(bar: object, **more) -> SimpleNamespace:
    """What a bar asks of a trainer: half of ten steps done."""
    metrics = {"upper/loss": 0.5, "lower/loss": 1.25, "monitor/loss": 0.75, "weights/effective_size": 30.0}
    trainer = {"progress_bar_callback": bar, "progress_bar_metrics": metrics, "is_global_zero": True, "world_size": 1}
    trainer |= {"estimated_stepping_batches": 10, "global_step": 5, "training": True, "current_epoch": 1}
    return SimpleNamespace(**trainer | more)


def test_the_bar_and_the_lines_say_what_counts(caplog):
    model = LitBilevel(PolicySettings("lit_bilevel/toy/model"), SoftmaxWeights(), OneStep())
    model.weights.build(torch.zeros(60, dtype=torch.int64))
    batch = {"lower": [SimpleNamespace(computed_tokens=400)]}
    for bar in (Bar(), Lines()):
        bar._rate = Rate()
        bar._rate.started -= 20
        bar._rate.add(batch)
        bar._rate.steps = 5
        trainer = progress_of(bar)
        if isinstance(bar, Bar):
            shown = bar.get_metrics(trainer, model)
            assert list(shown) == ["left", "upper", "lower", "effective", "monitor", "tokens/s"]
            assert shown == {"left": "0:00:20", "upper": "0.500", "lower": "1.250", "monitor": "0.750"} | {
                "effective": "50%",
                "tokens/s": "20",
            }
        else:
            with caplog.at_level("INFO"):
                bar._say(trainer, model)
            assert "epoch 2  step 5/10  upper 0.500  lower 1.250  effective 50%  monitor 0.750" in caplog.text
            assert "left 0:00:20" in caplog.text


def test_generation_has_a_bar_of_its_own_where_the_fit_has_one(capsys):
    for bar, shown in ((Bar(), True), (Lines(), False), (None, False)):
        with GenerationBar(progress_of(bar), 8) as generation:
            generation.tokens(1500)
            time.sleep(0.15)  # it is drawn ten times a second at most
            generation.responses(8)
        printed = capsys.readouterr().out
        assert ("generate |" in printed and "8/8 responses" in printed and "tokens=1.5k" in printed) is shown


def test_generation_has_a_bar_in_richs_display():
    progress = pytest.importorskip("rich.progress")
    rich = RichProgressBar()
    rich.progress = progress.Progress()
    with GenerationBar(progress_of(rich), 8) as generation:
        generation.tokens(1500)
        generation.responses(3)
        (task,) = rich.progress.tasks
        assert (task.completed, task.total, task.visible) == (3, 8, True)
    assert not task.visible
