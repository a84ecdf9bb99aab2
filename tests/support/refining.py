"""Runs that refine answers, and what they are held against."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lit_bilevel import BilevelDataModule, LitBilevel, OneStep, PolicySettings, SelfRefine, SoftmaxWeights
from lit_bilevel.callbacks import LowestFraction
from lit_bilevel.generation.base import Sampling
from lit_bilevel.types import Features
from support.files import TOY

NEVER = 10**6


def adam(lr: float):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def run(
    small, folder, refine, lr=1e-3, watch=(), steps=8, size=8, trainer_settings=None, policy=None, **settings
) -> LitBilevel:
    """A short run on 90 rows; returns the module, whose trainer knows the rest."""
    seed_everything(0)
    data = BilevelDataModule(small["pool"], small["validation"], small["test"], batch_size=size, max_length=48)
    settings = {"solver": OneStep(), "weights": SoftmaxWeights(), "optimizer": adam(lr), **settings}
    model = LitBilevel(PolicySettings(str(TOY / "model"), **(policy or {})), **settings)
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        callbacks=[refine, *watch],
        **(trainer_settings or {}),
    )
    trainer.fit(model, data)
    return model


def refine_all(every=NEVER, start=2, **settings) -> SelfRefine:
    """Every row is refined after two steps."""
    settings = {"choose": LowestFraction(1.0), "responses": 2, "sampling": Sampling(8), **settings}
    settings = {"on_doubt": "replace", **settings}  # the toy policy knows too little to be trusted
    return SelfRefine(every_n_steps=every, start=start, **settings)


class Logged(Callback):
    """Remembers what is logged in every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def features(*rows: int) -> Features:
    row = torch.tensor(rows)
    return Features(row, torch.zeros_like(row), torch.ones_like(row))


REFINE = (
    "--config=configs/refine.yaml",
    "--trainer.callbacks.every_n_steps=null",  # by epochs instead
    "--trainer.callbacks.start=1",
    "--trainer.callbacks.responses=2",
    "--trainer.callbacks.on_doubt=replace",  # this policy knows too little to be trusted
    "--trainer.callbacks.sampling.max_new_tokens=8",
)


def refine_flags(flags: list[str], folder, *more: str) -> list[str]:
    flags = [flag for flag in flags if "configs/" not in flag]
    return [*REFINE, *flags, f"--trainer.default_root_dir={folder}", *more]
