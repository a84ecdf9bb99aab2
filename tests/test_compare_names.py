"""What the names of compared methods mean, classes by their paths among them; which are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lit_bilevel.comparison import filters
from lit_bilevel.comparison.methods import Method
from lit_bilevel.comparison.names import FILTERS, SHARES
from lit_bilevel.errors import UserError
from lit_bilevel.solvers import Implicit


class Newton(Implicit):
    """A solver of a user's own."""


class Longest(filters.Filter):
    """A filter of a user's own."""

    def scores(self, evidence):
        return np.array([len(text) for text in evidence.texts("pool")], dtype=float)


def test_classes_by_their_paths_are_methods():
    method = Method.parse(f"{__name__}.Newton@softmax+refine:lit_bilevel.Aligned")
    assert method.flags[0] == f"--model.solver={__name__}.Newton"
    assert method.flags[1:] == ("--model.weights=SoftmaxWeights", "--model.response_weights=Aligned")
    assert isinstance(Method.parse(f"{__name__}.Longest").filter, Longest)
    for name, told in (("nowhere.Newton", "cannot be imported"), ("lit_bilevel.SoftmaxWeights", "no class made from")):
        with pytest.raises(UserError, match=told):
            Method.parse(name)


def test_names_of_methods():
    assert Method.parse("mixing").flags[:2] == ("--model.weights=UniformWeights", "--model.solver=Mixing")
    assert "--model.upper_weight=0.25" in Method.parse("mixing@0.25").flags
    assert Method.parse("one_step@sigmoid").flags == ("--model.solver=OneStep", "--model.weights=SigmoidWeights")
    assert Method.parse("penalty").constant  # λ must be above 0 in every step
    refined = Method.parse("one_step+refine:token")
    assert refined.refine
    assert "--model.response_weights=TokenRatio" in refined.flags
    assert Method.parse("two_stage:bmo").needs == "bmo"
    assert Method.parse("seal").needs == "penalty@softmax"
    assert Method.parse("best_mixing").best_of == SHARES
    assert Method.parse("best:one_step,mixing").best_of == ("one_step", "mixing")
    for name, kind in FILTERS.items():
        assert isinstance(Method.parse(name).filter, kind)
    assert Method.parse("score:ifd").filter.column == "ifd"
    assert Method.parse("weights:density_ratio").weights.column == "density_ratio"
    assert not Method.parse("weights:density_ratio").learns
    assert [name for name in ("one_step", "bmo", "mixing", "random", "seal") if Method.parse(name).learns] == [
        "one_step",
        "bmo",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onestep", "unknown method 'onestep'"),
        ("one_step@soft", "unknown weights 'soft'"),
        ("one_step+refine:x", "unknown response weights 'x'"),
        ("one_step:token", "need `.refine`"),
        ("mixing@2", "not a number between 0 and 1"),
        ("two_stage:mixing", "learns no weights"),
        ("two_stage:weights:ifd", "learns no weights"),
        ("score:idf", "unknown score 'idf'"),
        ("best:mixing,x", "unknown method 'x'"),
        ("one_step+refin", "unknown method 'one_step.refin'"),
        ("one_step+refine@softmax", "unknown method 'one_step.refine@softmax'"),
        ("bmo@softmax", "unknown method 'bmo@softmax'"),
        ("oracle@x", "unknown method 'oracle@x'"),
        ("best_mixing+refine", "unknown method 'best_mixing.refine'"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        Method.parse(name)


def test_refinement_is_put_in_and_taken_out():
    mine = {"class_path": "lit_bilevel.callbacks.SelfRefine", "init_args": {"responses": 2}}
    other = {"class_path": "Other"}
    plain = json.loads(Method.parse("one_step").callbacks([mine, other]).partition("=")[2])
    assert [callback["class_path"].rpartition(".")[2] for callback in plain] == ["Other", "Stopwatch"]
    refined = json.loads(Method.parse("one_step+refine").callbacks([mine, other]).partition("=")[2])
    assert mine in refined
    assert other in refined


def test_the_recipe_is_refined_with_groups_in_closed_form():
    """None of its phases learns weights when answers come."""
    method = Method.parse("curate+refine:agreement")
    assert method.recipe == "configs/curate.yaml"
    assert method.flags == ("--model.refined_weights=BMOWeights", "--model.response_weights=Agreement")
    classes = [
        callback["class_path"].rpartition(".")[2]
        for callback in json.loads(method.callbacks([])[len("--trainer.callbacks=") :])
    ]
    assert classes == ["ScoredPrior", "CleanProbability", "SelfRefine", "Stopwatch"]
    assert Method.parse("curate").flags == ()
    with pytest.raises(UserError, match="unknown method 'cross_fit'"):  # it has no scores in a step
        Method.parse("cross_fit")
