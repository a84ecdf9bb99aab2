"""Settings that would do nothing are refused by name, and those that look alike do what they say."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from support.files import TOY

import lit_bilevel
from lit_bilevel import (
    SFT,
    BelowThreshold,
    BilevelDataModule,
    BilevelSolver,
    BMOWeights,
    ExampleWeights,
    Implicit,
    LitBilevel,
    Mixing,
    Objective,
    OneStep,
    Phase,
    PolicySettings,
    Product,
    ResponseWeights,
    RowChooser,
    Sampling,
    SelfRefine,
    SoftmaxWeights,
    TokenRatio,
    UniformRatio,
    UniformWeights,
)
from lit_bilevel.errors import UserError
from lit_bilevel.training.guard import GuardSettings
from lit_bilevel.training.optimizers import make_optimizers
from lit_bilevel.training.refusals import check_run

PATH = str(TOY / "model")


def module(**settings) -> LitBilevel:
    parts = {"weights": SoftmaxWeights(), "solver": OneStep()} | settings
    return LitBilevel(PolicySettings(PATH, dtype=parts.pop("dtype", "auto")), **parts)


def fit(callbacks=(), precision: str = "32-true", **settings) -> LitBilevel:
    """A module under as much of a Trainer as `check_run` reads."""
    made = module(**settings)
    strategy = SimpleNamespace()
    made.trainer = SimpleNamespace(
        strategy=strategy, precision=precision, callbacks=list(callbacks), max_epochs=1, max_steps=-1
    )
    return made


NOTHING = {"weights": UniformWeights(), "solver": Mixing()}
REFUSED = {
    "kwargs of a constant rate": (
        lambda: module(lr_scheduler_kwargs={"min_lr_rate": 0.1}),
        r"`model.lr_scheduler_kwargs` .*'constant' takes none",
    ),
    "kwargs of a constant rate with warmup": (
        lambda: module(lr_scheduler="constant_with_warmup", lr_scheduler_kwargs={"min_lr_rate": 0.1}),
        "takes none",
    ),
    "a schedule of a metric": (lambda: module(lr_scheduler="greedy"), "`model.lr_scheduler` is greedy, which follows"),
    "λ that falls from 0": (lambda: module(upper_weight=0.0, upper_weight_decay=0.1), "`model.upper_weight_decay` is"),
    "λ that falls in no phase": (
        lambda: module(upper_weight_decay=0.1, phases=[Phase("a", 1.0, upper_weight=0.5)]),
        "`model.upper_weight_decay` is 0.1, but every phase has an `upper_weight` of its own",
    ),
    "a solver that is ready for nothing": (
        lambda: check_run(
            fit(phases=[Phase("a", 0.5), Phase("b", 0.5, learn_weights=False, prepare_solver=True)]), "fit"
        ),
        "the phase 'b' has `prepare_solver`, and no later one learns weights",
    ),
    "a solver that runs anyway": (
        lambda: module(phases=[Phase("a", 1.0, prepare_solver=True)]),
        "`prepare_solver` of the phase 'a'",
    ),
    "a rule of no responses": (
        lambda: check_run(fit(response_weights=TokenRatio()), "fit"),
        "`model.response_weights` is `TokenRatio`, but nothing is generated without the callback `SelfRefine`",
    ),
    "weights of no groups": (
        lambda: check_run(fit(refined_weights=BMOWeights()), "fit"),
        "`model.refined_weights` is `BMOWeights`, but nothing is generated",
    ),
    "a type that precision changes": (
        lambda: check_run(fit(precision="bf16-true", dtype="float32"), "fit"),
        "`model.policy.dtype` is float32, and `trainer.precision` bf16-true makes everything bfloat16",
    ),
    "a step of forward mode": (lambda: OneStep(derivative="forward", epsilon=0.1), "`derivative: forward` takes no"),
    "a tolerance of a series": (lambda: Implicit("neumann", tolerance=1e-3), "`tolerance` is 0.001, which"),
    "a step of conjugate gradient": (lambda: Implicit(step_size=0.1), "`step_size` is 0.1, which only"),
    "top-k of greedy": (lambda: Sampling(temperature=0, top_k=5), "`top_k` and `top_p` do nothing"),
    "top-p of greedy": (lambda: Sampling(temperature=0, top_p=0.5), "`top_k` and `top_p` do nothing"),
    "a threshold of 0": (lambda: BelowThreshold(0.0), "`threshold` is 0.0; it must be above 0"),
    "no rows of the upper level": (
        lambda: BilevelDataModule("p", "v", upper_batch_size=0),
        "`data.upper_batch_size` is 0; it must be at least 1",
    ),
    "an unknown side": (lambda: BilevelDataModule("p", "v", truncation="middle"), "`data.truncation` is 'middle'"),
    "unknown turns": (lambda: BilevelDataModule("p", "v", train_on="first"), "`data.train_on` is 'first'"),
    "an unknown policy": (lambda: BilevelDataModule("p", "v", on_bad_row="ignore"), "`data.on_bad_row` is 'ignore'"),
    "an unknown limit": (lambda: module(guard=GuardSettings(on_limit="tell")), "`model.guard.on_limit` is 'tell'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_without_effect_are_refused(name):
    made, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        made()


def test_settings_of_responses_are_taken_where_there_are_some():
    check_run(fit([SelfRefine()], response_weights=TokenRatio(), refined_weights=BMOWeights()), "fit")
    check_run(fit(response_weights=TokenRatio()), "test")  # by the configuration of a run that had some
    check_run(fit(precision="bf16-true", dtype="bfloat16"), "fit")


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "cosine", "linear", "inverse_sqrt"])
def test_every_schedule_rises_from_0_over_the_warmup(name):
    made = module(lr_scheduler=name, warmup_steps=4, optimizer=lambda values: torch.optim.SGD(values, lr=1.0))
    made.trainer = SimpleNamespace(estimated_stepping_batches=20, strategy=None)
    made.policy = SimpleNamespace(trainable=lambda: [torch.zeros(1, requires_grad=True)])
    made.weights.build(torch.zeros(4, dtype=torch.int64))
    (inner, _), (schedule,) = make_optimizers(made)
    rates = []
    for _ in range(5):
        rates.append(inner.param_groups[0]["lr"])
        inner.step()
        schedule["scheduler"].step()
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


# ---- settings stay where a class's signature says ----

KINDS = (BilevelSolver, ExampleWeights, Objective, RowChooser, ResponseWeights)
PUBLIC = [thing for name in lit_bilevel.__all__ if inspect.isclass(thing := getattr(lit_bilevel, name))]
CONCRETE = [kind for kind in PUBLIC if issubclass(kind, KINDS) and not inspect.isabstract(kind)]
REQUIRED = {Product: {"rules": [TokenRatio(), UniformRatio()]}, BelowThreshold: {"threshold": 0.3}}


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda kind: kind.__name__)
def test_arguments_stay_attributes_of_their_name(kind):
    given = REQUIRED.get(kind, {})
    thing = kind(**given)
    for name, parameter in inspect.signature(kind).parameters.items():
        assert getattr(thing, name) == given.get(name, parameter.default), name


def test_arguments_of_the_module_stay_attributes_of_their_name():
    given = {
        "weights": SoftmaxWeights(),
        "solver": OneStep(),
        "upper_objective": SFT(),
        "lower_objective": SFT(),
        "optimizer": torch.optim.SGD,
        "weight_optimizer": torch.optim.SGD,
        "upper_weight": 0.25,
        "upper_weight_decay": 0.125,
        "upper_weight_decay_every": 7,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 3,
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
        "response_weights": TokenRatio(),
        "refined_weights": UniformWeights(),
        "max_new_tokens": 9,
    }
    settings = GuardSettings(max_skipped_steps=3)
    made = module(**given, phases=[Phase("only", 1.0)], guard=settings)
    for name, value in given.items():
        assert getattr(made, name) is value, name
    assert made.phases == (Phase("only", 1.0),)
    assert (made.policy_settings.path, made.guard.settings) == (PATH, settings)
    names = {*given, "phases", "policy", "guard"}
    assert names == inspect.signature(LitBilevel).parameters.keys()
    assert not [name for name in made.state_dict() if name.startswith("refined_weights")]


def test_the_module_is_documented_in_the_order_of_its_signature_and_takes_settings_by_keyword():
    parameters = inspect.signature(LitBilevel).parameters
    assert re.findall(r"^    (\w+): ", inspect.getdoc(LitBilevel), re.MULTILINE) == list(parameters)
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["policy", "weights", "solver"]
