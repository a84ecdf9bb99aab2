"""The store, the overlay and the collation of groups."""

from __future__ import annotations

import io

import pytest
import torch

from lit_bilevel.data.collate import collate
from lit_bilevel.data.responses import ResponseStore, is_usable
from lit_bilevel.errors import UserError
from lit_bilevel.losses import example_nll
from lit_bilevel.refinement.responses_file import ResponseFile
from lit_bilevel.types import PADDING_ROW, Example, Response

POOL = 20


def response(*ids: int, finished: bool = True) -> Response:
    return Response(list(ids), [-0.5 * i for i in range(len(ids))], finished)


def filled(offline_share: float = 0.0) -> ResponseStore:
    store = ResponseStore()
    store.put(
        {
            7: [response(5, 6, 2), response(2), response(8, 2)],  # the second is empty
            3: [response(9, 9, 9, 2), response(4, 4, finished=False)],
            5: [response(2), response(1, 1, finished=False)],
        },
        temperature=0.8,
        offline_share=offline_share,
    )
    return store


def offline(row: int) -> Example:
    return Example(row, 0, [10, 11, 12, 13, 2], 3)


def test_only_finished_responses_with_content_are_used():
    assert is_usable(response(5, 2))
    assert not is_usable(response(2))  # the end token alone; nothing is put in its place
    assert not is_usable(response(5, 5, finished=False))
    assert is_usable(response(5, finished=False), keep_unfinished=True)
    store = filled()
    assert store.chosen == [3, 5, 7]
    assert store.rows == [3, 7]
    assert store.responses(7) == [response(5, 6, 2), response(8, 2)]
    assert store.mean_length == pytest.approx((4 + 3 + 2) / 3)


def test_the_overlay_replaces_refined_rows_alone():
    """The public code's row map was empty, so it generated text and trained on none of it."""
    examples = [offline(row) for row in (2, 3, 5, 7, PADDING_ROW)]
    assert ResponseStore().overlay(examples, POOL) == examples
    overlaid = filled().overlay(examples, POOL)
    assert [example.row for example in overlaid] == [2, POOL, 5, POOL + 1, PADDING_ROW]
    assert overlaid[1].input_ids == [10, 11, 12]
    assert overlaid[1].group.responses == (response(9, 9, 9, 2),)
    assert examples == [offline(row) for row in (2, 3, 5, 7, PADDING_ROW)]  # never edited
    both = filled(offline_share=0.3).overlay(examples, POOL)
    assert [example.row for example in both] == [2, 3, POOL, 5, 7, POOL + 1, PADDING_ROW]


def test_a_round_replaces_the_one_before():
    store = filled()
    store.put({3: [response(6, 2)], 9: [response(1, 2)]}, 1.0)
    assert (store.round, store.rows, store.chosen) == (2, [3, 9], [3, 9])
    assert store.responses(3) == [response(6, 2)]


def test_a_share_of_one_is_refused():
    with pytest.raises(UserError, match="`offline_share` is 1"):
        ResponseStore().put({}, 1.0, offline_share=1)


def test_the_store_survives_a_checkpoint_that_loads_weights_only():
    store, copy = filled(0.25), ResponseStore()
    buffer = io.BytesIO()
    torch.save(store.state_dict(), buffer)
    buffer.seek(0)
    copy.load_state_dict(torch.load(buffer, weights_only=True))
    for name in ("chosen", "rows", "round", "offline_share", "temperature", "mean_length"):
        assert getattr(copy, name) == getattr(store, name)
    assert [copy.responses(row) for row in copy.rows] == [store.responses(row) for row in store.rows]
    empty = ResponseStore()
    empty.load_state_dict(ResponseStore().state_dict())
    assert not len(empty)


def test_a_batch_of_offline_rows_and_groups():
    """One sequence a response; 1/G′ once; a constant length; targets are the sampled ids, not shifted again."""
    store = filled()
    batch = collate(store.overlay([offline(2), offline(3), offline(7)], POOL), 3)
    assert batch.input_ids_ST.tolist() == [  # by length
        [10, 11, 12, 13, 2, 0, 0],
        [10, 11, 12, 8, 2, 0, 0],
        [10, 11, 12, 5, 6, 2, 0],
        [10, 11, 12, 9, 9, 9, 2],
    ]
    assert batch.target_K.tolist() == [13, 2, 8, 2, 5, 6, 2, 9, 9, 9, 2]
    assert batch.input_ids_ST.flatten()[batch.position_K + 1].tolist() == batch.target_K.tolist()
    assert batch.segment_K.tolist() == [0, 0, 2, 2, 2, 2, 2, 1, 1, 1, 1]
    assert batch.length_B.tolist() == [2, 4, 2]
    generated = batch.generated
    assert generated.sequence_R.tolist() == [3, 2, 1]  # responses in the order of the examples
    assert generated.example_R.tolist() == [1, 2, 2]
    assert batch.target_K[generated.token_J].tolist() == [9, 9, 9, 2, 5, 6, 2, 8, 2]
    assert generated.response_J.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert generated.logprob_J.tolist() == [0, -0.5, -1, -1.5, 0, -0.5, -1, 0, -0.5]
    assert generated.temperature == 0.8
    nll_K = torch.arange(1.0, 12.0)
    expected = [1.5, (8 + 9 + 10 + 11) / 3, 0.5 * (3 + 4 + 5 + 6 + 7) / 3]
    assert example_nll(nll_K, batch).tolist() == pytest.approx(expected)


def test_batches_carry_their_generated_part():
    batch = collate(filled().overlay([offline(3)], POOL), 1)
    doubled = batch.map(lambda tensor: tensor * 2)
    assert doubled.generated.sequence_R.tolist() == [0]
    assert doubled.generated.logprob_J.tolist() == [0, -1, -2, -3]
    moved = batch.to(torch.device("meta"))
    assert moved.generated.token_J.device.type == "meta"
    assert moved.generated.temperature == 0.8
    assert collate([offline(1)], 1).generated is None


def test_the_file_is_appended_and_cut_back(tmp_path):
    file = ResponseFile(tmp_path / "run" / "responses.jsonl")
    assert file.length == 0
    file.append([{"id": "ä"}])
    length = file.length
    file.append([{"id": "b"}, {"id": "c"}])
    file.cut(length)
    assert file.path.read_text(encoding="utf-8") == '{"id": "ä"}\n'
    file.cut(10_000)
    assert file.length == length
