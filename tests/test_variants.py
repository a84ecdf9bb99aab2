"""Methods with settings and data of their own, in a comparison."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter

import pyarrow.parquet
import pytest
from support.comparing import compare, table_of
from support.files import ROOT, TOY, read_jsonl

from lit_bilevel.cli import BilevelCLI
from lit_bilevel.comparison.methods import Method
from lit_bilevel.comparison.names import OF_RESPONSES
from lit_bilevel.comparison.recipe import read_parts
from lit_bilevel.comparison.variants import Variant, read_variants
from lit_bilevel.errors import UserError

VARIANTS = """
slow:
  method: one_step@sigmoid
  flags: {model.weight_optimizer.lr: 0.1, trainer.max_steps: 3}
few:
  method: mixing
  pool_rows: 40
  corrupted: 0.25
  validation_rows: 20
part:
  method: one_step@sigmoid
  flags: {model.weight_optimizer.lr: 0.3}
  pool_rows: 40
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text(VARIANTS)
    return str(path)


def test_a_variant_is_its_method_with_settings(file):
    variants = read_variants(file)
    slow = Method.parse("slow", variants)
    assert slow.learns
    assert slow.flags[-2:] == ("--model.weight_optimizer.lr=0.1", "--trainer.max_steps=3")
    for name in ("two_stage:slow", "weighted:slow"):
        method = Method.parse(name, variants)
        assert method.needs == "slow"
        assert not method.learns
        assert "--model.weight_optimizer.lr=0.1" not in method.flags  # the second stage is trained as the others are
    for name in ("two_stage:part", "weighted:part"):  # it has the weights of these rows alone
        assert Method.parse(name, variants).variant == Variant("one_step@sigmoid", pool_rows=40)
        assert "--model.weight_optimizer.lr=0.3" not in Method.parse(name, variants).flags
    refined = Method.parse("more", {"more": Variant("one_step+refine", refine={"responses": 8})})
    mine = {"class_path": "SelfRefine", "init_args": {"responses": 2, "start": 5}}
    (callback, _) = json.loads(refined.callbacks([mine]).partition("=")[2])
    assert callback["init_args"] == {"responses": 8, "start": 5}
    assert Method.parse("best:slow,mixing", variants).best_of == ("slow", "mixing")


def test_rows_of_a_variant():
    kinds = ["", "x", "", "y"] * 25
    rows = Variant("mixing", pool_rows=30, corrupted=0.8).pool(["a", "b"] * 50, kinds)
    assert Counter(kinds[row] for row in rows) == {"": 6, "x": 12, "y": 12}
    assert sorted(set(rows)) == rows.tolist()
    assert len(Variant("mixing", pool_rows=10).pool(["a"] * 100, None)) == 10
    with pytest.raises(UserError, match="asks for 72 corrupted rows and the pool has 50"):
        Variant("mixing", pool_rows=90, corrupted=0.8).pool(["a"] * 100, kinds)
    with pytest.raises(UserError, match=r"give `--data\.truth`"):
        Variant("mixing", pool_rows=30, corrupted=0.8).pool(["a"] * 100, None)
    with pytest.raises(UserError, match="`validation_rows` is 9 and there are 8"):
        Variant("mixing", validation_rows=9).validation(["a"] * 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: mixing", "'a' must have `method`"),
        ("a: {method: mixing, flag: 1}", "'a' must have `method`"),
        ("- a", "must have `method`"),
        ("a: {method: mixing, corrupted: 0.5}", "needs `pool_rows`"),
        ("a: [", "is not YAML"),
        ("a: {method: best_mixing}", "it can only be one of a method"),
        ("a: {method: mixing, refine: {responses: 1}}", "no `.refine`"),
        ("a: {method: a}", "unknown method 'a'"),
        ("a: {method: [mixing]}", "unknown method"),
        ("a: {method: mixing, flags: [b]}", "'a': `flags: .*` is no table"),
        ("a: {method: mixing, pool_rows: '700'}", "`pool_rows: '700'` is no number of rows"),
        ("a: {method: mixing, pool_rows: 0}", "`pool_rows: 0` is no number of rows"),
        ("a: {method: mixing, validation_rows: true}", "`validation_rows: True` is no number of rows"),
        ("a: {method: mixing, pool_rows: 9, corrupted: x}", "`corrupted: 'x'` is no share"),
        ("a: {method: perplexity_difference, validation_rows: 9}", "needs a run of 'validation_only'"),
        ("a: {method: 'weighted:one_step', pool_rows: 9}", "needs a run of 'one_step'"),
    ],
)
def test_bad_variants_are_refused(tmp_path, text, message):
    path = tmp_path / "v.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Method.parse("a", read_variants(str(path)))
    with pytest.raises(UserError, match="does not exist"):
        read_variants(str(tmp_path / "none.yaml"))


def test_a_variant_takes_no_methods_name():
    with pytest.raises(UserError, match="'mixing' has the name of a method"):
        Method.parse("mixing", {"mixing": Variant("mixing", flags={"model.upper_weight": 0.1})})


def test_variants_in_a_table(small, tmp_path, file, capsys):
    asked = ["--variants", file, "--methods", "few", "slow", "weighted:slow", "two_stage:part"]
    assert compare(small, tmp_path / "out", *asked) == 0
    table = table_of(tmp_path / "out")
    steps = {name: int(float(row["steps"])) for name, row in table.items()}
    assert steps == {"few": 2, "slow": 3, "weighted:slow": 2, "part": 2, "two_stage:part": 2}
    assert len(read_jsonl(tmp_path / "out" / "two_stage-part" / "seed0" / "pool" / "pool.jsonl")) == 24  # of 40 rows
    corrupted = {row["id"] for row in read_jsonl(TOY / "truth.jsonl") if row["corrupted"]}
    pool = [row["id"] for row in read_jsonl(tmp_path / "out" / "few" / "rows" / "seed0" / "pool" / "pool.jsonl")]
    assert (len(pool), len(corrupted & set(pool))) == (40, 10)
    assert len(read_jsonl(tmp_path / "out" / "few" / "rows" / "seed0" / "validation" / "validation.jsonl")) == 20
    first, second = (
        pyarrow.parquet.read_table(tmp_path / "out" / name / "seed0" / "weights.parquet")["weight"].to_pylist()
        for name in ("slow", "weighted-slow")
    )
    assert first == pytest.approx(second, rel=1e-4)  # they stay as they are
    capsys.readouterr()
    (tmp_path / "variants.yaml").write_text(VARIANTS.replace("0.1", "0.2"))
    assert compare(small, tmp_path / "out", *asked) == 2
    assert "other settings (variant slow)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["variant few"].startswith("Variant(")


def test_the_script_of_the_results_names_methods_that_there_are():
    script = (ROOT / "scripts" / "evidence.sh").read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "evidence.sh")], check=False).returncode == 0
    variants = read_variants(str(ROOT / "scripts" / "variants.yaml"))
    lists = re.findall(r"^(?:core|others)=\((.*?)\)", script, flags=re.S | re.M)
    given = re.findall(r"--methods ((?:[\w@:]+ )+)", script)
    names = [name for part in (*lists, *given) for name in part.split()] + list(variants)
    assert len(lists) == len(given) == 2
    assert len(names) > 60
    shared = ["--config=configs/quality.yaml", f"--model.policy.path={TOY / 'model'}"]
    shared += [f"--data.{part}={TOY / part}.jsonl" for part in ("pool", "validation")]
    phases, callbacks = read_parts(BilevelCLI(shared, run=False).config)
    seen = set()
    for name in names:
        method = Method.parse(name, variants)
        flags = (*method.phases(phases, 200), *method.flags, *OF_RESPONSES * (not method.refine))
        flags = (*flags, method.callbacks(callbacks, TOY))
        if flags not in seen:  # the settings are accepted, too
            BilevelCLI([*shared, *flags], run=False)
        seen.add(flags)
