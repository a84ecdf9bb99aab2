"""Injected faults: numbers that are not finite, memory that runs out, backends that fail."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from support.files import TOY, read_jsonl
from support.refining import refine_all, refine_flags, run
from support.resuming import fit, short

from lit_bilevel import SFT, Mixing, OneStep, Penalty, PolicySettings, SelfRefine, SoftmaxWeights, ValueFunction
from lit_bilevel.cli import main
from lit_bilevel.errors import UserError
from lit_bilevel.generation.hf import HFGenerate
from lit_bilevel.losses import example_nll
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.load import load_policy
from lit_bilevel.refinement.choose import LowestFraction
from lit_bilevel.refinement.response_weights import SelfNormalised, TokenRatio
from lit_bilevel.training.guard import Guard, GuardSettings
from lit_bilevel.training.policy_step import step_policy
from lit_bilevel.types import Features
from lit_bilevel.weights import BMOWeights, NetworkWeights


@pytest.fixture
def poison(monkeypatch):
    """A set of row numbers whose loss is NaN from now on."""
    rows: set[int] = set()

    def losses(self, nll_K, batch):
        loss_B = example_nll(nll_K, batch)
        bad_B = torch.isin(batch.row_B, torch.tensor(sorted(rows), dtype=torch.int64))
        return loss_B * torch.where(bad_B, torch.nan, 1.0).to(loss_B)

    monkeypatch.setattr(SFT, "losses", losses)
    return rows


# ---- numbers ----


@pytest.mark.parametrize(
    ("solver", "weights"),
    [
        (OneStep(), SoftmaxWeights()),
        (ValueFunction(), SoftmaxWeights()),
        (OneStep(), NetworkWeights()),
        (Mixing(), BMOWeights()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_row_without_a_finite_loss_costs_its_step_alone(small, tmp_path, poison, solver, weights):
    poison.add(60)  # no validation row has this number
    with pytest.warns(UserWarning, match=r"policy step \d+ was skipped.*not finite on rows '.+'") as warned:
        model = run(small, tmp_path, Callback(), solver=solver, weights=weights, steps=11)
    pool = model.trainer.datamodule.sets["pool"]
    assert any(repr(pool[60]["id"]) in str(warning.message) for warning in warned)
    assert model.guard.skipped == 1
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in model.weights.parameters())
    table = model.weights.table()
    assert table.isfinite().all()
    assert table.min() >= 0
    assert table.std() > 0


class Spoil(Callback):
    """Makes the policy's gradient infinite in one step, by its backward pass alone: all losses stay finite."""

    def __init__(self, step: int):
        self.step, self.seen = step, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.broken = batch_idx == self.step
        if not self.seen:
            pl_module.policy.trainable()[0].register_hook(lambda g: g * torch.inf if self.broken else None)

    def on_train_batch_end(self, trainer, pl_module, *rest):
        rule = pl_module.refinement.rule
        parts = {
            "weights": pl_module.weights.state_dict(),
            "groups": pl_module.refinement.weights.state_dict() if pl_module.refinement.active else {},
            "optimizer": pl_module.optimizers()[1].optimizer.state_dict() if pl_module.learns_weights else {},
            "rule": rule.state_dict(),
            "rate": pl_module.lr_schedulers().get_last_lr(),
        }
        self.seen.append(copy.deepcopy(parts))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("settings", "refined"),
    [
        ({"solver": OneStep(), "weights": SoftmaxWeights()}, False),
        ({"solver": Mixing(), "weights": BMOWeights()}, False),
        ({"solver": OneStep(), "weights": SoftmaxWeights(), "response_weights": SelfNormalised()}, True),
        (
            {
                "solver": OneStep(),
                "weights": SoftmaxWeights(),
                "weight_optimizer": functools.partial(torch.optim.SparseAdam, lr=0.1, eps=1.0),
            },
            False,
        ),
    ],
    ids=["table", "closed", "refined", "optimizer with a state"],
)
def test_a_skipped_policy_step_takes_neither_weight_step_nor_rule_along(small, tmp_path, settings, refined, accumulate):
    settings = copy.deepcopy(settings)  # an object that has learned in one module is refused in another
    spoil = Spoil(3)
    watch = refine_all(choose=LowestFraction(0.9), responses=1) if refined else Callback()
    with pytest.warns(UserWarning, match="was skipped.*every row of the pool has a finite loss"):
        model = run(small, tmp_path, watch, watch=[spoil], steps=5, accumulate_grad_batches=accumulate, **settings)
    assert model.guard.skipped == 1
    before, skipped, after = spoil.seen[2:5]
    torch.testing.assert_close(skipped, before, rtol=0, atol=0, equal_nan=True)
    for part in ("groups", "rule") if refined else ("weights",):
        assert str(after[part]) != str(skipped[part]), part


def test_validation_rows_without_a_finite_loss_spoil_no_later_score(small, tmp_path, poison):
    class Heal(Callback):
        def on_train_batch_end(self, *rest):
            poison.clear()

    poison.update(range(30))
    with pytest.warns(UserWarning, match="was skipped"):
        model = run(small, tmp_path, Heal(), steps=6)
    assert all(value.isfinite().all() for value in model.solver.state_dict()["average"])
    assert model.weights.table().std() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `pytest.warns` shows again what is filtered elsewhere
def test_many_skipped_steps_in_a_row_end_in_a_checkpoint_of_the_last_good_state(small, tmp_path, poison, capsys):
    class Break(Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 5:
                poison.update(range(90))

    flags = short(small, tmp_path)
    with pytest.warns(UserWarning, match="was skipped"), pytest.raises(UserError, match="3 policy steps in a row"):
        fit(flags, "--model.guard.max_skipped_steps=3", "--checkpoint.every_n_steps=1", callbacks=(Break(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    state = checkpoint["state_dict"]
    assert all(
        value.isfinite().all() for name, value in state.items() if name.startswith("policy.") or "logits" in name
    )
    poison.clear()
    assert main(["fit", *flags, "--ckpt_path=last"]) == 0


class Collapse(Callback):
    """Puts nearly all weight on two rows after the fourth step."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step == 4:
            weight_N = torch.full((90,), 1e-6)
            weight_N[7], weight_N[60] = 80.0, 10.0
            pl_module.weights.logits.data.zero_()  # what was learned would multiply the prior
            pl_module.weights.set_prior(weight_N)


def ids(small, *rows: int) -> list[str]:
    records = read_jsonl(Path(small["pool"]))
    return [repr(records[row]["id"]) for row in rows]


COLLAPSED = r"policy step 5: the weights have collapsed on a few rows: their effective size is 1\.2\d of 90 rows"


def test_collapsed_weights_are_named_once(small, tmp_path):
    with pytest.warns(UserWarning, match=COLLAPSED) as warned:
        model = run(small, tmp_path, Collapse(), steps=9)
    (text,) = [str(warning.message) for warning in warned if "collapsed" in str(warning.message)]
    heaviest = text.partition("the heaviest are ")[2]
    one, other = ids(small, 7, 60)
    assert heaviest.startswith(f"{one} (8")
    assert f"), {other} (" in heaviest
    assert "`kl_to_prior`" in text
    assert model.global_step == 9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_collapsed_weights_stop_the_run_with_a_checkpoint_where_that_is_asked_for(small, tmp_path):
    flags = short(small, tmp_path)
    with pytest.raises(UserError, match=f"{COLLAPSED}.*so the run was stopped"):
        fit(flags, "--model.guard.on_limit=stop", callbacks=(Collapse(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    guard = Guard(GuardSettings(on_limit="stop"))
    guard.load_state_dict(checkpoint["lit_bilevel"]["guard"])
    assert not guard._is_new("weights")  # or a continued run would stop again at once


def test_weights_that_only_estimate_their_size_are_looked_at_after_an_epoch(small, tmp_path):
    class Heavy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if trainer.global_step == 12:
                pl_module.weights.loss_N.fill_(100.0)
                pl_module.weights.loss_N[7] = 0.0

    with pytest.warns(UserWarning, match=rf"policy step 12: the weights have collapsed.*{ids(small, 7)[0]} \(90\)"):
        run(small, tmp_path, Heavy(), solver=Mixing(), weights=BMOWeights(), steps=13)


class Forget(Callback):
    """Makes the first token of one refined row's responses as good as impossible under the policy that sampled it."""

    row = -1

    def on_train_batch_end(self, trainer, pl_module, *rest):
        store = trainer.datamodule.responses
        if len(store) and self.row < 0:
            self.row = store.rows[3]
            for response in store.responses(self.row):
                response.token_logprobs[0] = -60.0


@pytest.mark.parametrize("on_limit", ["warn", "stop"])
def test_exploding_ratios_are_named_once_a_round(small, tmp_path, on_limit):
    forget, settings = Forget(), {"guard": GuardSettings(on_limit=on_limit), "response_weights": TokenRatio()}
    match = r"policy step \d+: importance ratios explode: a token of row '(.+)' \(a generated response\) is \d\.\d+e\+2"
    if on_limit == "stop":
        with pytest.raises(UserError, match=match) as stopped:
            run(small, tmp_path, refine_all(), watch=[forget], steps=25, **settings)
        texts = [str(stopped.value)]
    else:
        with pytest.warns(UserWarning, match=match) as warned:
            model = run(small, tmp_path, refine_all(), watch=[forget], steps=25, **settings)
        texts = [str(warning.message) for warning in warned if "explode" in str(warning.message)]
        assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    (text,) = texts  # though the row came by twice
    assert f"row {ids(small, forget.row)[0]} (a" in text


def test_limits_are_checked(small, tmp_path):
    wrong = GuardSettings(max_skipped_steps=0, min_effective_size=1.0, max_ratio=1.0)
    with pytest.raises(UserError, match=r"(?s)max_skipped_steps.*min_effective_size.*max_ratio"):
        run(small, tmp_path, Callback(), guard=wrong)


# ---- generation ----


class Tight(HFGenerate):
    """Memory for three responses."""

    def generate(self, policy, requests, *rest):
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().generate(policy, requests, *rest)


class Broken(HFGenerate):
    """Fails from the second call on."""

    calls = 0

    def generate(self, *arguments):
        Broken.calls += 1
        if Broken.calls > 1:
            raise RuntimeError("the engine died")
        return super().generate(*arguments)


def test_memory_that_runs_out_changes_no_response(small, tmp_path):
    with pytest.warns(UserWarning, match="ran out of memory"):
        tight = run(small, tmp_path / "tight", refine_all(backend=Tight()), steps=3)
    run(small, tmp_path / "whole", refine_all(), steps=3)
    keys = ("id", "sample", "token_ids", "finished")
    tables = [read_jsonl(tmp_path / name / "responses.jsonl") for name in ("tight", "whole")]
    assert [[record[key] for key in keys] for record in tables[0]] == [[r[key] for key in keys] for r in tables[1]]
    assert tight.trainer.datamodule.responses.round == 1


def test_a_backend_that_fails_leaves_the_old_responses(small, tmp_path):
    Broken.calls = 0
    refine = refine_all(every=2, backend=Broken(), on_failure="keep")
    with pytest.warns(UserWarning, match=r"refinement round 2 failed .*the engine died.*goes on with the responses"):
        model = run(small, tmp_path, refine, steps=7)
    assert model.global_step == 7
    assert model.trainer.datamodule.responses.round == 1
    assert model.refinement.active


def test_a_backend_that_fails_stops_the_run_by_default(small, tmp_path):
    Broken.calls = 1
    with pytest.raises(UserError, match=r"refinement round 1 failed .*the engine died"):
        run(small, tmp_path, refine_all(backend=Broken()))


def test_a_stopped_run_begins_with_the_round_that_failed(flags, tmp_path, monkeypatch, capsys):
    arguments = ["fit", *refine_flags(flags, tmp_path / "run", "--trainer.max_epochs=2")]
    with monkeypatch.context() as patch:
        patch.setattr(HFGenerate, "generate", lambda *rest, **named: 1 / 0)
        assert main(arguments) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    assert main([*arguments, "--ckpt_path=last"]) == 0
    assert {record["round"] for record in read_jsonl(tmp_path / "run" / "responses.jsonl")} == {1}


def test_what_to_do_on_failure_is_checked():
    with pytest.raises(UserError, match="`on_failure` is 'hope'"):
        SelfRefine(on_failure="hope")


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
