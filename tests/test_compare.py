"""Comparing methods: what names mean, what filters prefer, what a difference is worth, tables that survive a kill."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from support.comparing import compare, table_of
from support.files import TOY, read_jsonl, write_jsonl

from lit_bilevel.cli import BilevelCLI
from lit_bilevel.comparison import answers, filters
from lit_bilevel.comparison.filters.evidence import Evidence, row_losses
from lit_bilevel.comparison.filters.gradients import GradientSimilarity
from lit_bilevel.comparison.filters.ngrams import NgramImportance, log_importance
from lit_bilevel.comparison.methods import Method
from lit_bilevel.comparison.names import FILTERS, SHARES
from lit_bilevel.comparison.results import Results
from lit_bilevel.comparison.rows import copy_records, stratify
from lit_bilevel.comparison.run import Runner
from lit_bilevel.comparison.significance import interval, permutation_test
from lit_bilevel.comparison.stopwatch import Stopwatch
from lit_bilevel.comparison.table import difference, markdown, share_of_gap, slower
from lit_bilevel.comparison.variants import Variant
from lit_bilevel.errors import UserError
from lit_bilevel.losses import example_nll
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.load import LoraSettings, PolicySettings
from lit_bilevel.solvers import Implicit

# ---- names ----


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


# ---- filters ----


def evidence(**known):
    """What a filter asks for, as plain values."""
    return SimpleNamespace(seed=0, truth=None, **known)


def test_loss_filters_order_rows_by_what_they_are_named_after():
    before, after = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.5, 2.0])
    seen = evidence(ids=["a", "b", "c"], losses=lambda tuned=False: after if tuned else before)
    assert filters.LowestLoss().scores(seen).argmax() == 1
    assert filters.HighestLoss().scores(seen).argmax() == 0
    assert filters.PerplexityDifference().scores(seen).tolist() == [2.0, -0.5, 0.0]


def test_learned_weights_are_joined_by_id(tmp_path):
    table = pyarrow.table({"id": ["c", "a", "b"], "weight": [0.5, 2.0, 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "weights.parquet")
    assert filters.LearnedWeights().scores(evidence(ids=["a", "b", "c"], earlier=tmp_path)).tolist() == [2.0, 1.0, 0.5]


def test_the_oracle_keeps_the_clean_rows_whatever_their_share(tmp_path):
    truth = write_jsonl(tmp_path / "t.jsonl", [{"id": str(i), "corrupted": i % 3 == 0} for i in range(9)])
    seen = evidence(ids=[str(i) for i in range(9)])
    with pytest.raises(UserError, match=r"give `--data\.truth`"):
        filters.CleanRows().scores(seen)
    seen.truth = truth
    mask = filters.CleanRows().choose(filters.CleanRows().scores(seen), keep=0.1, seed=0)
    assert mask.tolist() == [i % 3 != 0 for i in range(9)]


def test_a_share_is_kept_and_equal_scores_are_drawn_by_lot():
    score = np.repeat([3.0, 2.0, 1.0], 100)
    masks = [filters.LowestLoss().choose(score, 0.5, seed) for seed in (0, 1)]
    for mask in masks:
        assert (mask[:100].sum(), mask[100:200].sum(), mask[200:].sum()) == (100, 50, 0)
    assert (masks[0] != masks[1]).any()
    assert not (np.diff(masks[0][100:200].nonzero()[0]) == 1).all()  # not simply the first ones
    with pytest.raises(UserError, match="not finite"):
        filters.LowestLoss().choose(np.array([1.0, np.nan]), 0.5, 0)


def test_random_rows_differ_by_seed():
    one, two = (filters.RandomRows().scores(SimpleNamespace(seed=seed, ids=["x"] * 50)) for seed in (0, 1))
    assert (one != two).any()


def test_importance_prefers_texts_that_look_like_the_target():
    random = np.random.default_rng(0)
    near, far = ["apple", "pear", "plum", "fig"], ["bolt", "nut", "screw", "cog"]
    pool = [" ".join(random.choice(near if i % 2 == 0 else far, 8)) for i in range(60)]
    target = [" ".join(random.choice(near, 8)) for _ in range(30)]
    score = log_importance(pool, target)
    assert score[::2].min() > score[1::2].max()
    drawn = NgramImportance().scores(evidence(texts=lambda name: pool if name == "pool" else target))
    assert drawn[::2].mean() > drawn[1::2].mean()
    assert log_importance(pool, pool) == pytest.approx(np.zeros(60), abs=1e-9)  # nothing to prefer
    assert log_importance(["", "apple"], target).shape == (2,)


def test_gradient_similarity_is_the_cosine_with_the_mean_direction():
    pool = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    upper = torch.tensor([[3.0, 0.0], [0.5, 0.0]])
    seen = evidence(
        ids=list("abcde"),
        policy=lambda tuned, adapter: SimpleNamespace(trainable=lambda: [torch.zeros(2)]),
        row_gradients=lambda policy, name: enumerate(upper if name == "upper" else pool),
    )
    assert GradientSimilarity().scores(seen) == pytest.approx([1, 0, -1, 0.5**0.5, 0], abs=1e-6)


@pytest.fixture(scope="module")
def built(small):
    """The toy configuration, its data set up, nothing run."""
    paths = [f"--data.{name}={path}" for name, path in small.items()]
    cli = BilevelCLI(["--config=configs/quickstart.yaml", *paths, f"--data.tokenizer={TOY / 'model'}"], run=False)
    cli.datamodule.setup()
    return cli


def test_losses_and_gradients_of_rows_are_those_of_training(built):
    found = Evidence(built, None, 0)
    policy = found.policy()
    loss, tokens = row_losses(policy, built.datamodule, "upper")
    gradients = torch.stack([gradient for _, gradient in found.row_gradients(policy, "upper")])
    (window,) = built.datamodule.evaluation_loader("upper")
    batch = built.datamodule.on_before_batch_transfer(window, 0)
    mean = example_nll(policy(batch), batch).mean()
    whole = torch.cat([part.flatten() for part in torch.autograd.grad(mean, policy.trainable())])
    assert loss.mean() == pytest.approx(mean.item(), rel=1e-5)
    assert tokens.sum() == batch.length_B.sum()
    torch.testing.assert_close(gradients.mean(0), whole, rtol=1e-3, atol=1e-5)


def test_an_adapter_of_an_earlier_run_is_loaded(built, tmp_path):
    found = Evidence(built, tmp_path, 0)
    found.settings = PolicySettings(str(TOY / "model"), lora=LoraSettings(r=2))
    policy = found.policy()
    with torch.no_grad():
        for parameter in policy.trainable():
            parameter.fill_(0.1)
    policy.model.save_pretrained(tmp_path / "policy")
    assert all((parameter == 0.1).all() for parameter in found.policy(tuned=True).trainable())
    assert not all((parameter == 0.1).all() for parameter in found.policy().trainable())


def test_scores_keep_and_weight_rows_by_one_pass(small, tmp_path, monkeypatch, capsys):
    from lit_bilevel.comparison.filters import evidence

    passes, score_rows = [], evidence.score_rows
    monkeypatch.setattr(evidence, "score_rows", lambda *a, **k: passes.append(1) or score_rows(*a, **k))
    output = tmp_path / "out"
    names = ["score:ifd", "weights:density_ratio", "weights:ifd"]
    assert compare(small, output, "--methods", *names, "--max_steps", "3") == 0, capsys.readouterr()
    assert len(passes) == 1
    rows = table_of(output)
    assert set(rows) == set(names)
    assert float(rows["score:ifd"]["kept"]) == pytest.approx(0.6, abs=0.01)
    for name in names:
        assert 0 < float(rows[name]["auroc/all"]) < 1
    assert rows["score:ifd"]["auroc/all"] == rows["weights:ifd"]["auroc/all"]  # a sigmoid keeps the order
    (scores,) = output.glob("scores-*.parquet")
    ratio = pyarrow.parquet.read_table(scores)["density_ratio"].to_numpy()
    folder = Results(output, {}).run_folder("weights:density_ratio", 0)
    kept = pyarrow.parquet.read_table(folder / "weights.parquet")["weight"].to_numpy()
    np.testing.assert_allclose(kept, ratio, rtol=2e-3)  # where they began, for nothing learns


# ---- rows ----


def test_records_are_copied_with_their_history_and_their_ids(tmp_path):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    first = write_jsonl(tmp_path / "one.jsonl", [{"messages": turns}, {"messages": turns[2:] + turns[:2]}])
    second = write_jsonl(tmp_path / "two.jsonl", [{"prompt": "p", "response": "r", "key": "k", "more": [1]}])
    files = copy_records([first, second], {"key": "id"}, {1: "1", 2: "k"}, tmp_path / "new")
    assert [Path(file).name for file in files] == ["one.jsonl", "two.jsonl"]  # their names are their rows' sources
    assert [record for file in files for record in read_jsonl(Path(file))] == [
        {"messages": turns[2:] + turns[:2], "id": "1"},
        {"prompt": "p", "response": "r", "key": "k", "more": [1]},
    ]
    assert isinstance(copy_records(second, {}, {0: "0"}, tmp_path / "single"), str)


def test_a_subset_has_the_proportions_of_the_whole():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    rows = stratify(strata, 20, seed=0)
    assert [sum(strata[i] == name for i in rows) for name in "abc"] == [12, 6, 2]
    assert rows.tolist() == stratify(strata, 20, seed=0).tolist() != stratify(strata, 20, seed=1).tolist()
    with pytest.raises(UserError, match="`--subset` is 200"):
        stratify(strata, 200, seed=0)


# ---- what a difference is worth ----


def test_the_permutation_test_agrees_with_all_sign_flips():
    difference = np.array([0.9, -0.2, 0.5, 0.4, -0.1, 0.6, 0.3, 0.2])
    flips = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(flips) >= abs(difference.sum()) - 1e-9)
    assert permutation_test(difference) == pytest.approx(exact, abs=0.01)


def test_the_permutation_test_finds_what_is_there_and_no_more():
    random = np.random.default_rng(0)
    assert permutation_test(random.normal(0.2, 1, 1000), rounds=999) == 0.001
    none = [permutation_test(random.normal(0, 1, 100), rounds=199, seed=i) for i in range(100)]
    assert 0.3 < np.mean(none) < 0.7  # uniform where there is no difference
    assert permutation_test(np.zeros(5)) == 1


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-6)
    assert interval([0.0, 1.0] * 16)[1] == pytest.approx(2.0395 * (8 / 31 / 32) ** 0.5, rel=2e-3)
    assert np.isnan(interval([1.0])[1])
    assert np.isnan(interval([])[0])


def test_differences_are_over_the_seeds_that_both_have():
    losses = {
        "mixing": {0: np.array([2.0, 2.0]), 1: np.array([9.0, 9.0])},  # an unlucky seed
        "oracle": {0: np.array([1.0, 1.0]), 1: np.array([9.0, 9.0])},
        "mine": {0: np.array([1.5, 1.5])},
        "other": {2: np.array([1.0, 1.0])},
    }
    assert difference("mine", losses).startswith("-0.5000 (")
    assert share_of_gap("mine", losses) == "0.50"
    assert (difference("other", losses), share_of_gap("other", losses)) == ("–", "–")
    assert (difference("mixing", losses), share_of_gap("mixing", losses)) == ("0", "0.00")
    times = [[{"seed": seed, "seconds": seconds} for seed, seconds in part] for part in ([(0, 3)], [(0, 2), (1, 50)])]
    assert slower(*times) == "1.50"


# ---- answers ----


def test_refusals_are_told_by_set_phrases():
    for text in ("I'm sorry, but no.", "I can’t help with that.", "I have to decline this request.", "Sorry, no."):
        assert answers.refuses(text), text
    for text in ("Sure! It is easy.", "We cannot see the chair. The answer is no.", "x" * 300 + "I cannot help."):
        assert not answers.refuses(text), text


def test_measures_of_answers():
    same = ["the cat sat on the mat", "a b c d e f"]
    found = answers.measures(same, same, ["comply", None])
    assert found == {"exact_match": 1, "bleu": pytest.approx(1), "rougeL": pytest.approx(1), "over_refusal": 0}
    found = answers.measures(["7", "I cannot help."], ["8", "9"], ["comply", "refuse"])
    assert (found["exact_match"], found["refusal"], found["over_refusal"]) == (0, 1, 0)
    assert "bleu" not in found  # references of one word


def test_pairs_show_both_answers_in_either_order(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        records = [{"id": str(i), "prompt": "p", "response": f"{name}{i}"} for i in range(40)]
        write_jsonl(tmp_path / name / "predictions.jsonl", records)
    assert answers.write_pairs(tmp_path / "a", tmp_path / "b", ("A", "B"), tmp_path / "pairs.jsonl") == 40
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    assert all(pair[f"answer_{k}"][0] == pair[f"method_{k}"].lower() for pair in pairs for k in (1, 2))
    assert 5 < sum(pair["method_1"] == "A" for pair in pairs) < 35
    with pytest.raises(UserError, match="--answers"):
        answers.write_pairs(tmp_path / "a", tmp_path / "c", ("A", "C"), tmp_path / "pairs.jsonl")


# ---- whole tables ----


class Killed(BaseException):
    """Stands for whatever ends a process."""


def test_a_table_survives_a_kill_and_is_not_run_twice(small, tmp_path, monkeypatch, capsys):
    asked = ["--methods", "mixing", "two_stage:one_step", "oracle", "--checkpoint.every_n_steps=1", "--subset", "60"]
    with monkeypatch.context() as patched:
        step = LitBilevel.training_step

        def killed(self, batch, batch_idx):
            if "two_stage" in self.trainer.default_root_dir and self.global_step == 1:
                raise Killed
            return step(self, batch, batch_idx)

        patched.setattr(LitBilevel, "training_step", killed)
        with pytest.raises(Killed):
            compare(small, tmp_path / "a", *asked)
    assert list(table_of(tmp_path / "a")) == ["mixing", "one_step"]
    assert (tmp_path / "a" / "two_stage-one_step" / "seed0" / "checkpoints" / "last.ckpt").exists()
    assert compare(small, tmp_path / "a", *asked) == 0
    assert compare(small, tmp_path / "b", *asked) == 0
    tables = [table_of(tmp_path / name) for name in "ab"]
    assert list(tables[0]) == ["mixing", "one_step", "two_stage:one_step", "oracle"]
    for name in tables[0]:
        assert tables[0][name]["test_loss"] == tables[1][name]["test_loss"]
    losses = pyarrow.parquet.read_table(tmp_path / "a" / "test_losses.parquet")
    assert np.mean(losses["mixing"].to_numpy()) == pytest.approx(float(tables[0]["mixing"]["test_loss"]), rel=1e-5)
    kept = read_jsonl(tmp_path / "a" / "oracle" / "seed0" / "pool" / "pool.jsonl")
    clean = {row["id"] for row in read_jsonl(TOY / "truth.jsonl") if not row["corrupted"]}
    assert {row["id"] for row in kept} <= clean
    assert "gap closed" in (tmp_path / "a" / "results.md").read_text()
    monkeypatch.setattr(Runner, "_run", None)  # nothing is left to run
    assert compare(small, tmp_path / "a", *asked) == 0
    capsys.readouterr()
    assert compare(small, tmp_path / "a", *asked[:-1], "50") == 2
    assert "other settings (subset)" in capsys.readouterr().err


def test_a_recipe_runs_beside_other_methods_under_a_configuration_without_its_phases(small, tmp_path):
    assert compare(small, tmp_path, "--methods", "curate", "mixing") == 0
    table = table_of(tmp_path)
    assert float(table["curate"]["steps"]) > float(table["mixing"]["steps"]) == 2  # before the last phase
    assert 0 <= float(table["curate"]["auroc/all"]) <= 1
    assert "auroc/all" not in {k for k, v in table["mixing"].items() if v}
    text = (tmp_path / "results.md").read_text()
    assert "The monitor part (" in text or "cannot tell" in text


def test_a_run_that_fails_stops_no_others(small, tmp_path, capsys):
    variants = tmp_path / "variants.yaml"
    wrong = "{method: one_step, flags: {model.upper_weight: 2}}"
    missing = "{method: one_step, flags: {model.no_such_setting: 2}}"
    variants.write_text(f"wrong: {wrong}\nmissing: {missing}\n")
    output = tmp_path / "out"
    asked = ["--methods", "wrong", "missing", "two_stage:wrong", "mixing", "--variants", str(variants)]
    assert compare(small, output, *asked) == 2
    assert list(table_of(output)) == ["mixing"]
    shown = capsys.readouterr()
    assert "3 of the runs failed: wrong (seed 0), missing (seed 0), two_stage:wrong (seed 0)." in shown.err
    assert "failed: UserError: " in shown.out
    for name, what in (("wrong", "`model.upper_weight` is 2.0"), ("missing", "no_such_setting")):
        assert what in (output / name / "seed0" / "log.txt").read_text()


def test_the_stopwatch_counts_whole_fits_across_a_kill_and_nothing_of_a_test():
    watch = Stopwatch()
    watch.load_state_dict({"seconds": 100.0})  # where the killed part had come to
    watch.on_train_start(None, None)
    watch.on_train_end(None, None)
    assert 100 < watch.seconds < 101
    watch.load_state_dict({"seconds": 30.0})  # the monitor-best checkpoint, which is tested
    assert watch.seconds > 100


def test_the_best_share_is_chosen_on_monitor(small, tmp_path):
    assert compare(small, tmp_path, "--methods", "best:mixing,mixing@0.5", "--pairs", "mixing", "mixing@0.5") == 0
    table = table_of(tmp_path)
    best = min(("mixing", "mixing@0.5"), key=lambda name: float(table[name]["monitor_loss"]))
    assert table["best:mixing,mixing@0.5"]["chosen"] == best
    assert table["best:mixing,mixing@0.5"]["test_loss"] == table[best]["test_loss"]
    assert "exact_match" in table["mixing"]
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == 16
    assert "Chosen by monitor loss" in (tmp_path / "results.md").read_text()


def test_mistakes_are_told_before_anything_runs(small, tmp_path, capsys):
    assert compare(small, tmp_path, "--methods", "mixin") == 2
    assert "unknown method 'mixin'" in capsys.readouterr().err
    assert compare(small, tmp_path, "--methods", "mixing", "--keep", "2") == 2
    assert "`--keep` is 2" in capsys.readouterr().err
    assert compare(small, tmp_path / "none", "--methods", "mixing", "--trainer.limit_train_batches=0.5") == 2
    assert "`trainer.limit_train_batches` is 0.5" in capsys.readouterr().err
    kept = tmp_path / "of_a_user" / "precious.txt"
    kept.parent.mkdir()
    kept.touch()
    assert compare(small, kept.parent, "--methods", "mixing", "--fresh") == 2
    assert "`--fresh` removes earlier comparisons" in capsys.readouterr().err
    assert kept.exists()
    with pytest.raises(UserError, match="another `--output`"):
        Results(tmp_path, {"keep": 0.5})


def test_losses_of_rows_have_the_precision_of_the_run_and_belong_to_its_data(small, tmp_path, monkeypatch, capsys):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(Path(small["pool"]).read_text())
    monkeypatch.chdir(tmp_path)
    asked = ["--methods", "mixing", f"--data.pool={pool}", "--trainer.precision=bf16-mixed"]
    asked += ["--data.truth=lit_bilevel/toy/truth.jsonl", "--subset=80"]  # found in any folder
    assert compare(small, tmp_path / "out", *asked) == 0
    losses = pyarrow.parquet.read_table(tmp_path / "out" / "test_losses.parquet")["mixing"].to_numpy()
    assert np.mean(losses) == pytest.approx(float(table_of(tmp_path / "out")["mixing"]["test_loss"]), rel=1e-6)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[1:]))
    capsys.readouterr()
    assert compare(small, tmp_path / "out", *asked) == 2
    assert "other settings (data)" in capsys.readouterr().err


def runner_of(rows=(), **known):
    """A runner that knows these things, and these finished runs."""
    runner = Runner.__new__(Runner)
    runner.variants, runner.sets = {}, {"pool": range(100)}
    runner.settings = SimpleNamespace(
        data=SimpleNamespace(batch_size=8), model=SimpleNamespace(accumulate_grad_batches=2)
    )
    runner.results = SimpleNamespace(find=lambda name, seed: dict(rows)[name])
    runner.__dict__.update(known)
    return runner


def test_every_run_takes_the_steps_of_the_shortest_limit():
    def steps(max_steps, max_epochs):
        trainer = SimpleNamespace(max_steps=max_steps, max_epochs=max_epochs, limit_train_batches=1.0)
        return runner_of()._run_steps(trainer)

    assert [steps(-1, 2), steps(5000, 2), steps(5, 2), steps(5000, -1), steps(5000, None)] == [14, 14, 5, 5000, 5000]
    with pytest.raises(UserError, match="no run would end by its steps"):
        steps(-1, None)


def test_steps_that_a_variant_sets_are_its_own():
    epoch = "--model.upper_weight_decay_every=7"
    shared = ["--trainer.max_steps=14", "--trainer.max_epochs=-1", epoch]
    flags = {None: shared, "max_steps": shared[1:2], "max_epochs": []}
    for own, wanted in flags.items():
        variant = Variant("oracle", flags={f"trainer.{own}": 3}) if own else None
        assert runner_of(steps=14)._as_many_steps(variant) == wanted


def test_a_filter_scores_under_the_settings_of_its_method(monkeypatch, tmp_path):
    asked = []

    def built(config, flags):
        asked.extend(flags)
        raise Killed

    monkeypatch.setattr("lit_bilevel.comparison.run.built", built)
    method = Method.parse("mine", {"mine": Variant("lowest_loss", flags={"data.max_length": 9})})
    with pytest.raises(Killed):
        runner_of(config="c", shared=["--a"])._choose(method, ["--b"], tmp_path, None, 0)
    assert asked[0] == "--a"
    assert asked[-3:] == ["--data.max_length=9", "--b", "--seed_everything=0"]


def test_a_run_that_several_need_is_timed_once():
    seconds = {"one_step": 10.0, "two_stage:one_step": 14.0, "weighted:one_step": 15.0, "mixing": 2.0}
    rows = [(name, {"method": name, "seconds": value, "monitor_loss": value}) for name, value in seconds.items()]
    name = f"best:{','.join(seconds)}"
    found = runner_of(rows)._best(name, Method.parse(name), 0)
    assert (found["chosen"], found["seconds"]) == ("mixing", 10 + 4 + 5 + 2)


def test_a_table_says_how_many_steps_where_they_differ():
    losses = {name: {0: np.ones(3)} for name in ("mixing", "slow")}

    def text(steps):
        rows = [{"method": n, "seed": 0, "test_loss": 1.0, "seconds": 1.0, "steps": s} for n, s in steps.items()]
        return markdown(rows, losses, {}, "command")

    assert "200 policy steps a run" in text({"mixing": 200, "slow": 200})
    assert "| steps |" not in text({"mixing": 200, "slow": 200})
    different = text({"mixing": 200, "slow": 375})
    assert "| steps |" in different
    assert "| 375 |" in different
    assert "policy steps a run" not in different


def test_the_best_of_runs_that_never_looked_is_refused():
    runner = SimpleNamespace(row=lambda name, seed: {"method": name, "seconds": 1.0})
    with pytest.raises(UserError, match=r"never looked at in mixing, one_step.*val_check_interval"):
        Runner._best(runner, "best:mixing,one_step", Method.parse("best:mixing,one_step"), 0)
