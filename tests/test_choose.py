"""Which rows are refined, when, and under which settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.files import TOY, read_jsonl, write_jsonl
from support.refining import refine_all, run

from lit_bilevel import BilevelDataModule, SelfRefine
from lit_bilevel.callbacks import BelowThreshold, LowestFraction, RandomFraction
from lit_bilevel.data.table import has_question
from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import Sampling


def test_choosers():
    weight = torch.tensor([1.0, 0.2, 3.0, 0.2, 0.6])
    assert LowestFraction(0.4).rows(weight, 0).tolist() == [1, 3]
    assert BelowThreshold(0.61).rows(weight, 0).tolist() == [1, 3, 4]
    one, two = (RandomFraction(0.6).rows(weight * factor, 5).tolist() for factor in (1, 2))
    assert one == two
    assert len(set(one)) == 3
    assert LowestFraction(0.001).rows(weight, 0).tolist() == [1]
    tied = torch.cat([torch.zeros(50), torch.ones(50)])
    drawn = [LowestFraction(0.1).rows(tied, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) < 50
    assert sorted(drawn[0]) != list(range(10))  # not simply the first ones
    with pytest.raises(UserError, match="`fraction`"):
        LowestFraction(0)


def mixed_pool(folder, plain: int, asked: int) -> list[str]:
    rows = read_jsonl(TOY / "pool.jsonl")
    texts = [{"id": f"t{i}", "text": row["response"] + f" {i}"} for i, row in enumerate(rows[:plain])]
    files = {"texts": texts, "asked": rows[plain : plain + asked]}
    return [write_jsonl(folder / f"{name}.jsonl", records) for name, records in files.items() if records]


@pytest.mark.parametrize(
    "choose", [LowestFraction(0.5), RandomFraction(0.5), BelowThreshold(2.0)], ids=lambda rule: type(rule).__name__
)
def test_rows_without_a_question_are_never_refined(small, tmp_path, choose):
    """Of 60 plain texts 58 were replaced by what follows their first token."""
    data = small | {"pool": mixed_pool(tmp_path, 60, 30)}
    with pytest.warns(UserWarning, match="60 of 90 pool rows have no question") as told:
        model = run(data, tmp_path, refine_all(every=2, choose=choose))
    assert len([warning for warning in told if "no question" in str(warning.message)]) == 1
    chosen = model.trainer.datamodule.responses.chosen
    assert min(chosen) >= 60
    assert len(chosen) == (15 if isinstance(choose, RandomFraction) else len(chosen)) > 0
    assert {record["id"][0] for record in read_jsonl(tmp_path / "responses.jsonl")} != {"t"}


def test_a_pool_without_questions_cannot_be_refined(small, tmp_path):
    with pytest.raises(UserError, match="no row of the pool has one"):
        run(small | {"pool": mixed_pool(tmp_path, 60, 0)}, tmp_path, refine_all())


def test_a_question_that_was_cut_off_is_none(small, tmp_path):
    """From the left, until the answer alone is as long as a row may be."""
    table = BilevelDataModule(
        small["pool"], small["validation"], tokenizer=str(TOY / "model"), max_length=6, truncation="left"
    )
    table.setup()
    pool = table.sets["pool"]
    cut = [start <= 1 for start in pool["response_start"][:]]
    assert 0 < sum(cut) < len(cut)
    assert has_question(pool).tolist() == [not none_left for none_left in cut]


def test_when_to_refine():
    """The public code waited for step 5000 whatever the settings."""
    refine = SelfRefine(every_n_steps=3, start=4)
    assert [step for step in range(12) if refine.should_refine(step)] == [4, 7, 10]
    assert [step for step in range(5) if SelfRefine(every_n_steps=2, start=0).should_refine(step)] == [2, 4]
    assert [epoch for epoch in range(5) if SelfRefine().should_refine(epoch)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 2}, "both set"),
        ({"responses": 0}, "`responses` is 0"),
        ({"offline_share": 1.0}, "`offline_share` is 1"),
        ({"responses": 4, "sampling": Sampling(temperature=0)}, "would be the same"),
    ],
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        SelfRefine(**settings)


def test_sharded_policies_are_refused():
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace())
    with pytest.raises(UserError, match="ddp"):
        SelfRefine().on_fit_start(trainer, None)
