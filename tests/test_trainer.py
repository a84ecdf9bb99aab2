"""The typed way to what a Trainer holds: its callbacks by class, and a module of this project or a message."""

from __future__ import annotations

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint

from lit_bilevel.callbacks import BilevelCheckpoint, Predictions, WeightInspector
from lit_bilevel.callbacks.run import module_of, run_checkpoint
from lit_bilevel.errors import UserError
from lit_bilevel.training.trainer import callbacks_of, find_callbacks


def trainer_with(*callbacks) -> Trainer:
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **plain)


def test_callbacks_are_found_by_class_in_their_order():
    other, own = ModelCheckpoint(monitor="monitor/loss", filename="mine"), BilevelCheckpoint()
    trainer = trainer_with(Predictions(), own, other)
    found = find_callbacks(trainer, ModelCheckpoint)
    assert found == [callback for callback in callbacks_of(trainer) if callback in (own, other)]
    assert len(found) == 2
    assert find_callbacks(trainer, BilevelCheckpoint) == [own]
    assert find_callbacks(trainer, LambdaCallback) == []
    assert run_checkpoint(trainer) is own  # wherever it stands


@pytest.mark.parametrize("make", [WeightInspector, Predictions])
def test_callbacks_beside_another_module_say_so(make):
    trainer, module = trainer_with(make()), LightningModule()
    callback = find_callbacks(trainer, make)[0]
    start = callback.on_fit_start if make is WeightInspector else callback.on_predict_start
    with pytest.raises(UserError, match="need a `LitBilevel`, and the Trainer has a `LightningModule`"):
        start(trainer, module)
    with pytest.raises(UserError, match=r"take them out of `trainer.callbacks`"):
        module_of(module)
