"""What other loggers than TensorBoard are given, settings of a run as flat values, and figures of resampled rows."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from support.files import read_jsonl

from lit_bilevel import BilevelDataModule, LitBilevel, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.callbacks import SelfRefine, WeightInspector
from lit_bilevel.inspection.figures import _trajectories
from lit_bilevel.inspection.folder import Inspection
from lit_bilevel.inspection.settings import run_settings

QUANTILES = [f"weights_quantile/{q}" for q in ("05", "25", "50", "75", "95")]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra `figures`)")
def test_weights_are_drawn_where_other_rows_were_sampled_before(tmp_path):
    from matplotlib.figure import Figure

    def axes_of(*epochs):
        files = Inspection(tmp_path / str(len(list(tmp_path.iterdir()))) / "inspection")
        files.write("epochs.jsonl", [{"weights_quantile/50": 1.0, "epoch": 0, **epoch} for epoch in epochs])
        figure = Figure()
        assert _trajectories(figure, files.folder.parent)
        return figure.axes[0].lines[0].get_data()

    first, second = {"step": 4, "rows": [1, 2], "weights": [0.5, 2.0]}, {"step": 8, "rows": [1], "weights": [0.7]}
    assert [list(part) for part in axes_of(first)] == [[0, 4], [1, 0.5]]
    assert [list(part) for part in axes_of(first, second)] == [[8], [0.7]]
    start = {"step": 0, "rows": [1], "weights": [0.6]}  # weights of an earlier run
    assert [list(part) for part in axes_of(start, second)] == [[0, 8], [0.6, 0.7]]


def test_settings_know_subclasses_and_optimizers_of_the_module():
    class Mine(SelfRefine):
        pass

    model = LitBilevel(PolicySettings("lit_bilevel/toy/model"), SoftmaxWeights(), OneStep())
    policy, weights = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr) for lr in (0.1, 0.2))
    model.own_optimizer = weights
    data = SimpleNamespace(batch_size=1, upper_batch_size=1, max_length=1, seed=0)
    trainer = SimpleNamespace(optimizers=[policy], callbacks=[Mine(responses=3)], datamodule=data)
    trainer.precision, trainer.world_size = "32-true", 1
    found = run_settings(trainer, model)
    assert (found["optimizer.lr"], found["weight_optimizer.lr"], found["refine.responses"]) == (0.1, 0.2, 3)


def test_any_logger_gets_the_scalars_and_the_rest_is_in_files(small, tmp_path):
    seed_everything(0)
    data = BilevelDataModule(small["pool"], small["validation"], small["test"], batch_size=16)
    model = LitBilevel(PolicySettings("lit_bilevel/toy/model"), SoftmaxWeights(), OneStep())
    trainer = Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[WeightInspector(rows=3)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert all(name in header for name in (*QUANTILES, "weights/rank_correlation"))
    epochs = read_jsonl(tmp_path / "inspection" / "epochs.jsonl")
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert sum(epochs[0]["histogram"]["counts"]) == 90
    assert len(epochs[0]["weights"]) == 90
    assert len(read_jsonl(tmp_path / "inspection" / "rows.jsonl")) == 6
