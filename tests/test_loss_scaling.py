"""Scaled losses and casts: unscaled once, overflows that are no fault, steps that DeepSpeed skips by itself."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from support.files import TOY
from support.refining import run

from lit_bilevel import Mixing, OneStep, Penalty, PolicySettings
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.load import load_policy
from lit_bilevel.training.guard import Guard, GuardSettings
from lit_bilevel.training.policy_step import step_policy
from lit_bilevel.types import Features


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # where the first step is skipped
def test_a_scaled_loss_is_unscaled_once_and_an_overflow_is_no_fault(small, tmp_path):
    """16-mixed, with the scaler that Lightning gives to GPUs."""
    models = []
    for scale in (None, 2.0**10, 2.0**60):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, backoff_factor=2.0**-50)
        plugins = [] if scale is None else [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        settings = {"gradient_clip_val": 0.1, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)}
        settings |= {"solver": Mixing(), "trainer_settings": {"plugins": plugins}}
        models.append(run(small, tmp_path, Callback(), steps=4, **settings))
    precise, scaled, overflowed = models
    assert (scaled.guard.skipped, overflowed.guard.skipped, overflowed.guard.in_a_row) == (0, 1, 0)
    assert overflowed.trainer.precision_plugin.scaler.get_scale() == 2.0**10
    base = load_policy(PolicySettings(str(TOY / "model")), torch.float32).trainable()
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(precise.policy.trainable(), base, strict=True)])
    found = torch.cat([(a - b).detach().flatten() for a, b in zip(scaled.policy.trainable(), base, strict=True)])
    assert (found - moved).norm() < 0.05 * moved.norm()


class Overflows:
    """Stands around the backward passes of a run: sees which of them overflow, or lets the same ones of another do so.

    Args:
        wanted: numbers of the backward passes whose gradients are made NaN.
    """

    def __init__(self, wanted: list[int] | None = None):
        self.calls, self.seen, self.wanted = 0, [], wanted or []

    def around(self, backward):
        """`LitBilevel.manual_backward` with this around it."""

        def counted(module, loss):
            backward(module, loss * torch.nan if self.calls in self.wanted else loss)
            gradients = [parameter.grad for parameter in module.policy.trainable() if parameter.grad is not None]
            if not all(gradient.isfinite().all() for gradient in gradients):
                self.seen.append(self.calls)
            self.calls += 1

        return counted


@pytest.mark.filterwarnings("ignore:(Detected call of `lr_scheduler.step|policy step . was skipped)")
@pytest.mark.parametrize("solver", [Penalty, OneStep])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**16, 2.0**40], ids=lambda scale: f"2^{math.log2(scale):.0f}")
def test_solvers_learn_the_same_weights_under_loss_scaling(small, tmp_path, monkeypatch, scale, solver):
    """As in float32 with NaN where the scale overflowed: it fits, hardly fits (Lightning's first one), or must fall.

    A run whose first step was skipped is no run without that: all rows are scored by a policy that is a step behind,
    and of this young one the log-weights of two such runs correlate by 0.3, in float32 as well.
    """
    backward = LitBilevel.manual_backward

    def learned(scaler=None, wanted=None):
        overflows = Overflows(wanted)
        monkeypatch.setattr(LitBilevel, "manual_backward", overflows.around(backward))
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scaler is not None else []
        module = run(small, tmp_path, Callback(), steps=11, solver=solver(), trainer_settings={"plugins": plugins})
        assert all(parameter.isfinite().all() for parameter in module.policy.parameters())
        assert module.guard.in_a_row == 0
        return module, overflows.seen

    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-12)
    scaled, overflowed = learned(scaler)
    assert (scaled.guard.skipped == 0) if scale == 2.0**10 else (scaled.guard.skipped > 1 or scale == 2.0**16)
    precise, made = learned(wanted=overflowed)
    assert (precise.guard.skipped, made) == (scaled.guard.skipped, overflowed)
    logs = [module.weights.table().log() for module in (scaled, precise)]
    assert (logs[0] - logs[1]).std() < 0.1 * logs[1].std()
    assert logs[1].std() > 0.05


class Engine:
    """DeepSpeed's, which looks at gradients by itself and skips the step.

    Args:
        applied: whether the last step was taken.
        scale: of the loss, after it was lowered for an overflow.
    """

    def __init__(self, applied: bool, scale: float):
        self.was_step_applied = lambda: applied
        self.optimizer = SimpleNamespace(loss_scale=scale)


def test_a_step_that_deepspeed_skipped_by_itself_is_none():
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    taken, rates = [], []
    module = SimpleNamespace(
        trainer=SimpleNamespace(
            strategy=strategy,
            precision_plugin=SimpleNamespace(),
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=4)),
        ),
        device=torch.device("cpu"),
        lr_schedulers=lambda: SimpleNamespace(step=lambda: rates.append(1)),
        log=lambda *logged: None,
        weights=SimpleNamespace(pool_rows=9),
    )
    features = Features(*torch.zeros(3, 2, dtype=torch.long), loss_B=torch.ones(2))
    guard, optimizer = Guard(GuardSettings(max_skipped_steps=2)), SimpleNamespace(step=lambda: taken.append(1))
    module.guard = guard
    for applied, scale, in_a_row in (
        (False, 2.0, 0),
        (False, 1.0, 1),
        (True, 1.0, 0),
        (False, 1.0, 1),
        (False, 1.0, 2),
    ):
        strategy._model = Engine(applied, scale)
        told = nullcontext() if applied or scale > 1 else pytest.warns(UserWarning, match="policy step 5 was skipped")
        with told:
            assert step_policy(module, optimizer, features, None, None) is applied
        assert guard.in_a_row == in_a_row
    assert (len(taken), len(rates), guard.skipped) == (5, 1, 4)
    with pytest.raises(UserError, match="2 policy steps in a row had a gradient that is not finite"):
        guard.stop_if_asked()


class Casts(Callback):
    """Casts every parameter once the strategy has set the module up, as DeepSpeed does below float32."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.uncast = [(parameter, parameter.detach().clone()) for parameter in pl_module.weights.parameters()]
        for parameter in pl_module.weights.parameters():
            parameter.data = parameter.data.bfloat16()


def test_weights_that_were_cast_are_put_back(small, tmp_path):
    whole, cast = (run(small, tmp_path, callback, steps=2, solver=Penalty()) for callback in (Callback(), Casts()))
    assert torch.equal(whole.weights.table(), cast.weights.table())
    assert whole.weights.table().std() > 0
