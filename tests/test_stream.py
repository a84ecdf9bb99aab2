"""The order of training and of evaluation: every row once, the same after resuming, shared by processes."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from support.files import TOY, read_jsonl, write_jsonl
from support.sources import module
from torch.utils.data import DataLoader

from lit_bilevel import LitBilevel, OneStep, PolicySettings, SoftmaxWeights
from lit_bilevel.data.collate import collate, share_of_rank
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.data.stream import PairedStream, Schedule
from lit_bilevel.types import PADDING_ROW, Example


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
