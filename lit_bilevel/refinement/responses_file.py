"""Writes `responses.jsonl`: every response of a run, a JSON object a line, on disk as soon as a round is done.

The file's length is in the checkpoint; a resumed run first cuts the file back to it, so that no round is there twice.
Left out: rotating the file; ten thousand responses of a hundred tokens are about 25 MB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset

from lit_bilevel.types import Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ResponseFile:
    """An append-only file that can be cut back.

    Args:
        path: the file; made at the first round.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, length: int) -> None:
        """Drop everything after `length` bytes."""
        if self.length > length:
            os.truncate(self.path, length)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, and wait until they are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())


def text_of(response: Response, tokenizer: PreTrainedTokenizerBase) -> str:
    """What was answered, without control tokens."""
    text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    return cast("str", text)  # one of one list of ids


def records(
    pool: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    responses: Mapping[int, Sequence[Response]],
    used: Mapping[int, Sequence[Response]],
    round: int,
    temperature: float,
) -> Iterator[dict[str, Any]]:
    """What is kept on file of every response of a round.

    Args:
        pool: the table of the pool.
        tokenizer: of the policy.
        responses: of every chosen row.
        used: those of each row that are trained on.
        round: its number.
        temperature: at which they were sampled.
    """
    names = pool.select_columns(["id", "row"])
    for row, group in responses.items():
        known = names[row]
        for sample, response in enumerate(group):
            yield {
                **known,
                "round": round,
                "sample": sample,
                "response": text_of(response, tokenizer),
                "token_ids": response.token_ids,
                "token_logprobs": response.token_logprobs,
                "logprob": sum(response.token_logprobs),
                "temperature": temperature,
                "finished": response.finished,
                "agreement": response.agreement,
                "used": any(response is other for other in used[row]),
            }
