"""Data: reading, refusing, splitting, encoding, and the stream's order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from support.files import SHARED, TOY, read_jsonl, write_jsonl
from support.sources import Source
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lit_bilevel import LitBilevel, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.data.collate import collate, share_of_rank
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.split import split
from lit_bilevel.data.stream import PairedStream, Schedule
from lit_bilevel.errors import UserError
from lit_bilevel.types import PADDING_ROW, Example, Row

GOOD = {"id": "a", "prompt": "add: 1+1", "response": "2", "source": "add"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    records = read_jsonl(TOY / "pool.jsonl")[:20]
    path = tmp_path / f"pool.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, records)
    elif suffix == "json":
        path.write_text(json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    rows = Source(str(path)).rows()
    assert [(row.id, row.prompt, row.response, row.source) for row in rows] == [
        (r["id"], r["prompt"], r["response"], r["source"]) for r in records
    ]
    assert [row.row for row in rows] == list(range(20))


def test_id_and_source_are_optional_and_columns_can_be_renamed(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "q", "answer": "r"}, {"question": "q2", "answer": "r2"}])
    rows = Source(path, columns={"question": "prompt", "answer": "response"}).rows()
    assert rows == [Row(0, "0", "q", "r", ""), Row(1, "1", "q2", "r2", "")]


BAD = {
    "missing": ({"id": "b", "prompt": "x"}, "the field `response` is missing"),
    "empty": (GOOD | {"id": "b", "response": "  "}, "the field `response` is empty"),
    "type": (GOOD | {"id": "b", "prompt": 3}, "the field `prompt` is int, not a string"),
    "duplicate": (GOOD, "the id 'a' was already used"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_with_its_line(tmp_path, name):
    record, message = BAD[name]
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD, record])
    with pytest.raises(UserError, match="line 2") as caught:
        Source(path).rows()
    assert message in str(caught.value)
    assert path in str(caught.value)
    source = Source(path, on_bad_row="skip")
    assert [row.id for row in source.rows()] == ["a"]
    assert len(source.skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{broken\n", "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"[1]\n", "not an object"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Source(str(path)).rows()


def test_unknown_columns_are_refused_with_the_remedy(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"x": "1", "y": "2"}])
    with pytest.raises(UserError, match=r"fit no known format.*data\.columns"):
        Source(path).rows()


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        Source("nowhere.jsonl").rows()


# ---- encoding ----


@pytest.fixture(scope="module")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY / "model")


def test_plain_template_masks_the_prompt_and_learns_eos(toy_tokenizer):
    encoded = Encoder(toy_tokenizer, 64).rows([Row(0, "a", "add: 1+1", "2", "")])[0]
    prompt = toy_tokenizer("add: 1+1\n", add_special_tokens=False).input_ids
    answer = toy_tokenizer("2", add_special_tokens=False).input_ids
    assert encoded.input_ids == [*prompt, *answer, toy_tokenizer.eos_token_id]
    assert encoded.response_start == len(prompt)
    assert not encoded.truncated


def test_truncation_is_flagged_and_takes_eos(toy_tokenizer):
    encoded = Encoder(toy_tokenizer, 12).rows([Row(0, "a", "add: 1+1", "2" * 40, "")])[0]
    assert len(encoded.input_ids) == 12
    assert encoded.truncated
    assert encoded.input_ids[-1] != toy_tokenizer.eos_token_id


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared base model")
def test_chat_template_gives_the_ids_of_transformers():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
    row = Row(0, "a", "What is a cat?", "An animal.", "")
    messages = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = Encoder(tokenizer, 64).rows([row])[0]
    assert encoded.input_ids == expected["input_ids"]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.response_start == expected["assistant_masks"].index(1)
    assert Encoder(tokenizer, 64).prompts([row.prompt]) == [encoded.input_ids[: encoded.response_start]]


def test_a_prompt_that_fills_the_context_is_refused(tmp_path):
    long = write_jsonl(tmp_path / "p.jsonl", [GOOD, GOOD | {"id": "long", "prompt": "z" * 50}])
    data = BilevelDataModule(long, str(TOY / "validation.jsonl"), tokenizer=str(TOY / "model"), max_length=30)
    with pytest.raises(UserError, match=r"line 2, id 'long': no response token fits"):
        data.setup()


def test_a_rename_of_a_field_that_no_file_has_is_refused(small, tmp_path):
    pool = [{**record, "question": record["prompt"]} for record in read_jsonl(Path(small["pool"]))]
    for record in pool:
        del record["prompt"]
    files = {**small, "pool": write_jsonl(tmp_path / "pool.jsonl", pool)}
    columns = {"question": "prompt"}  # the validation file has `prompt` itself
    for _ in range(2):  # the second time the sets are read from the cache
        module(files, columns=columns).setup()
        with pytest.raises(UserError, match=r"`data.columns` renames 'quesion', and no record of any file"):
            module(files, columns=columns | {"quesion": "system"}).setup()


# ---- splits and overlap ----


def module(small, **settings) -> BilevelDataModule:
    return BilevelDataModule(
        small["pool"], small["validation"], small["test"], tokenizer=str(TOY / "model"), batch_size=8, **settings
    )


def test_validation_is_split_by_id_whatever_the_order(small, tmp_path):
    first = module(small)
    first.setup()
    shuffled = write_jsonl(tmp_path / "v.jsonl", read_jsonl(Path(small["validation"]))[::-1])
    second = module(small | {"validation": shuffled})
    second.setup()
    for name in ("upper", "monitor"):
        assert set(first.sets[name]["id"]) == set(second.sets[name]["id"])
    assert not set(first.sets["upper"]["id"]) & set(first.sets["monitor"]["id"])
    assert len(first.sets["monitor"]) == 6


def test_overlap_with_the_pool_is_refused(small, tmp_path):
    rows = read_jsonl(Path(small["validation"]))
    rows[3]["prompt"] = read_jsonl(Path(small["pool"]))[0]["prompt"]
    leaky = write_jsonl(tmp_path / "v.jsonl", rows)
    with pytest.raises(UserError, match=r"share no prompt with the pool.*" + rows[3]["id"]):
        module(small | {"validation": leaky}).setup()


def test_a_validation_file_of_one_row_is_refused(small, tmp_path):
    one = write_jsonl(tmp_path / "v.jsonl", [GOOD | {"prompt": "unseen"}])
    with pytest.raises(UserError, match="too few to split"):
        module(small | {"validation": one}).setup()


# ---- the stream ----


@pytest.mark.parametrize(("pool", "window"), [(96, 8), (97, 8), (90, 16), (5, 4)])
def test_an_epoch_visits_every_row_once_and_never_one_alone(pool, window):
    schedule = Schedule(pool, 7, window, 3, seed=1)
    windows = [schedule.lower(0, step) for step in range(schedule.steps)]
    assert sorted(row for w in windows for row in w) == list(range(pool))
    assert all(2 <= len(w) <= window for w in windows)
    assert windows != [schedule.lower(1, step) for step in range(schedule.steps)]


def test_any_pool_is_cut_into_windows_that_can_be_learned_from():
    """Every row once an epoch, no window larger than asked for but where one row would be left alone."""
    hypothesis = pytest.importorskip("hypothesis")
    numbers = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @hypothesis.given(numbers(1, 300), numbers(1, 4) | numbers(1, 70), numbers(0, 3), numbers(0, 3))
    def check(pool, window, seed, epoch):
        schedule = Schedule(pool, 7, window, 3, seed)
        windows = [schedule.lower(epoch, step) for step in range(schedule.steps)]
        sizes = [len(rows) for rows in windows]
        assert sorted(row for rows in windows for row in rows) == list(range(pool))
        assert min(sizes) >= min(window, 2, pool)
        assert max(sizes) <= (3 if window == 2 and pool % 2 else window)
        assert max(sizes) - min(sizes) <= 1

    check()


def test_windows_of_two_train_on_an_odd_pool(small, tmp_path):
    """One of the windows has three rows, in two micro-batches."""
    pool = write_jsonl(tmp_path / "pool.jsonl", read_jsonl(Path(small["pool"]))[:5])
    module = LitBilevel(PolicySettings(str(TOY / "model")), SoftmaxWeights(), OneStep())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, BilevelDataModule(pool, small["validation"], batch_size=2, max_length=64, seed=0))
    assert trainer.global_step == 4
    assert module.weights.visits.tolist() == [2] * 5


def test_the_upper_stream_is_a_chain_of_permutations():
    schedule = Schedule(100, 7, 8, 3, seed=1)
    rows = [row for position in range(7) for row in schedule.upper(position)]
    assert all(sorted(rows[i : i + 7]) == list(range(7)) for i in (0, 7, 14))


def test_the_orders_of_both_levels_have_nothing_to_do_with_each_other():
    """Where both have as many rows, each pool row would else meet the same validation rows for ever."""
    schedule = Schedule(40, 40, 40, 40, seed=1)
    assert schedule.lower(0, 0) != schedule.upper(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where the tests may use one core only
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumed_anywhere_continues_the_same(workers):
    def make(epoch, step, position):
        return (epoch, step, position)

    def stream(position):
        s = PairedStream(make, 5, lambda: 5, num_workers=workers)
        s.position = position
        return s

    whole = stream(0)
    expected = [item for _ in range(3) for item in whole]
    assert expected == [(i // 5, i % 5, i) for i in range(15)]
    for position in (1, 4, 5, 9):
        resumed = stream(position)
        found = []
        while len(found) < 15 - position:
            found += list(resumed)
        assert found == expected[position:]


def test_creating_the_iterator_draws_no_global_random_numbers():
    state = torch.get_rng_state()
    list(PairedStream(lambda *address: address, 3, lambda: 3))
    assert torch.equal(state, torch.get_rng_state())


def test_shares_of_ranks_partition_the_window():
    examples = [Example(row, 0, [1] * (3 + row % 4), 1) for row in range(7)]
    shares = [share_of_rank(examples, rank, 2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 4
    rows = [example.row for share in shares for example in share]
    assert sorted(row for row in rows if row != PADDING_ROW) == list(range(7))


def test_rows_of_evaluation_are_dealt_out_once(small):
    """To any number of processes, as many batches on each, by nothing that Lightning would deal out again."""
    data = module(small, eval_batch_size=3)
    data.setup()
    whole = data.sets["test"]
    for rows, processes in itertools.product((1, 2, 5, 16), (1, 2, 3, 5)):
        data.sets["test"] = whole.select(range(rows))
        windows, questions = [], []
        for rank in range(processes):
            data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
            loaders = data.test_dataloader(), data.predict_dataloader()
            assert not any(isinstance(loader, DataLoader) for loader in loaders)
            windows.append(list(loaders[0]))
            questions.append(list(loaders[1]))
            assert [len(loader) for loader in loaders] == [len(windows[0]), len(questions[0])]
            assert [len(windows[-1]), len(questions[-1])] == [len(windows[0]), len(questions[0])]
        found = [window for own in windows for window in own]
        assert {window.rows for window in found} == {rows}
        assert all(window.examples for window in found)  # a batch of nothing cannot be collated
        dealt = [example.row for window in found for example in window.examples if example.row != PADDING_ROW]
        assert sorted(dealt) == list(range(rows))
        assert sorted(q.row for own in questions for batch in own for q in batch) == list(range(rows))
        assert max(len(batch) for own in questions for batch in own) <= 3


def test_collate_points_at_response_tokens():
    batch = collate([Example(4, 0, [10, 11, 12, 13], 2), Example(PADDING_ROW, 0, [20, 21], 1)], window_rows=1)
    flat = batch.input_ids_ST.flatten()
    assert flat[batch.position_K].tolist() == [20, 11, 12]
    assert batch.target_K.tolist() == [21, 12, 13]
    assert batch.segment_K.tolist() == [1, 0, 0]
    assert batch.scale_K.tolist() == [0.0, 0.5, 0.5]


def test_batches_are_cut_where_it_saves_padding():
    examples = [Example(row, 0, [1] * length, 1) for row, length in enumerate([50, 3, 4, 48])]
    assert [part[:3] for part in collate(examples, 4, call_cost=10).parts] == [(0, 2, 4), (2, 4, 50)]
    assert [part[:3] for part in collate(examples, 4).parts] == [(0, 4, 50)]
    assert sum(part.predicted for part in collate(examples, 4, 10).parts) == 49 + 2 + 3 + 47


def test_a_short_validation_set_does_not_cost_the_order_of_the_pool(monkeypatch):
    drawn = []
    original = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda size, **settings: drawn.append(size) or original(size, **settings))
    schedule = Schedule(999, 3, 10, 32, seed=77)
    for step in range(5):
        schedule.lower(0, step)
        schedule.upper(step)
    assert drawn.count(999) == 1


def test_the_test_file_may_share_no_prompt_with_validation(small, tmp_path):
    """Else the policy is tested on rows that it was chosen by; `skip` leaves them out of validation."""
    rows = read_jsonl(Path(small["validation"]))
    test = write_jsonl(tmp_path / "test.jsonl", [{**rows[3], "id": "other"}, *read_jsonl(Path(small["test"]))])
    settings = {"tokenizer": str(TOY / "model"), "max_length": 64, "cache": False}
    with pytest.raises(UserError, match="share no prompt with validation.*" + rows[3]["id"]):
        BilevelDataModule(small["pool"], small["validation"], test, **settings).setup("fit")
    data = BilevelDataModule(small["pool"], small["validation"], test, on_bad_row="skip", **settings)
    data.setup("fit")
    assert len(data.sets["upper"]) + len(data.sets["monitor"]) == len(rows) - 1
    assert len(data.skipped["validation"]) == 1


def test_equal_prompts_are_not_parted_by_the_split():
    ids = [f"row{number}" for number in range(40)]
    table = Dataset.from_dict({"id": ids, "question": [bytes([number // 4]) for number in range(40)]})
    upper, monitor = split(table, 0.2)
    assert (len(upper), len(monitor)) == (32, 8)
    assert not set(upper["question"]) & set(monitor["question"])
